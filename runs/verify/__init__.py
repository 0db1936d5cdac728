"""Ask an OpenAI-compatible server what an agent would, and count what comes back."""
