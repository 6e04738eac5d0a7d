"""From a book to training batches: scenes, chats of each character, tokens with their channels, packed
rows."""
