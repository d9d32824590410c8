"""Models as folders and on the Hugging Face hub."""
