"""What a command does, callable without click."""
