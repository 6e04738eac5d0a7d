"""Whom a visitor can meet in a chat: a character of a scene, or the one of a character card."""

from dataclasses import replace

from common.files import UsageError
from data import prompts
from data.cards import VISITOR, part_of, staged
from data.chats import system_prompt


class SceneRole:
    """A character of a scene."""

    greetings = ()

    def __init__(self, scene, character):
        self.character, self.introduction = character, f"from {scene.book}. {scene.scenario}"
        self.system = system_prompt(scene, character, prompts.AT_PLAY, concise=True)

    def system_and_notes(self, heard, examples=True):
        """heard: the texts so far. notes: (depth, text) pairs, for `insert`."""
        return self.system, []


class CardRole:
    """The character of a card. Its lorebook is searched anew in every turn.

    count: text -> number of tokens. actions: read `*waves*` as `(waves)`. seed: of the macros that draw.
    """

    def __init__(self, card, count, actions=False, seed=0):
        self.card, self.options = card, dict(user=VISITOR, count=count, actions=actions, seed=seed)
        part = part_of(card, **self.options)
        if part.name == VISITOR:
            raise UsageError(f"the card's character is called {VISITOR}, as whoever talks with it; rename it")
        self.character, self.greetings = part.name, part.greetings
        self.introduction = f"from a character card. {part.scenario}"

    def system_and_notes(self, heard, examples=True):
        """As SceneRole's; without examples the system text leaves the card's example dialogue out.

        A card's own system prompt replaces the first paragraph, which says whom to play; who that is, the
        scene and how to write stay.
        """
        part = part_of(self.card, heard=heard, examples=examples, **self.options)
        scene = staged([replace(part, instructions="")], self.card, part.scenario)
        opening, sections = system_prompt(scene, part.name, prompts.AT_PLAY, concise=True).split("\n\n", 1)
        system = f"{part.opening(opening)}\n\n{sections}"
        return system, [*part.notes, *([(0, part.instructions)] if part.instructions else [])]


def insert(messages, depth, text):
    """Puts a note into the user turn that is `depth` messages from the end of a chat, or into the next one.

    The chat ends with a user turn; its other turns are the character's own, with which nothing is mixed.
    """
    index, note = max(0, len(messages) - 1 - depth), f"===Note===\n{text}\n\n"
    if depth > len(messages) - 1:  # before the oldest message
        messages[0]["content"] = note + messages[0]["content"]
    elif messages[index]["role"] == "user":
        messages[index]["content"] += note
    else:
        messages[index + 1]["content"] = note + messages[index + 1]["content"]
