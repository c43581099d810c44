"""An OpenAI-compatible server in front of one offloaded model."""
