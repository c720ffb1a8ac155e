"""Configuration: what may be asked for (`schema`), and how a person asks for it (`load`)."""
