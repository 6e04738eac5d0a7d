"""Scenes, prompts, chats and packed rows: the way of the data from a book to a batch."""
