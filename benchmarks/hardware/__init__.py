"""What a GPU and its link can do: first run, decode, host reads."""
