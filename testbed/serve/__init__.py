"""An OpenAI-compatible endpoint in front of a live model; its requests share the rounds to the nodes."""
