"""What could keep a site from working, each with what to do about it."""
