"""From books to training batches: scenes, chats of each character, tokens, packed rows."""
