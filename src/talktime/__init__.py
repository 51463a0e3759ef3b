"""talktime."""
