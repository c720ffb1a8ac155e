"""Statistics of each kind of answer: classes and numbers, overlap and surfaces, by subgroup."""
