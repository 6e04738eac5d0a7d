"""The terminal as a stage: colours, styles, lines as they are spoken."""

import re

from rich.cells import cell_len
from rich.text import Text

from common import terminal
from data.brackets import ACTION, SPEECH, THOUGHT, BracketParser
from data.chats import NEXT_SPEAKER
from data.scenes import ENVIRONMENT, straighten
from play.replies import clean_reply

STYLES = {SPEECH: "", ACTION: "italic", THOUGHT: "dim"}  # of a message's channels on a terminal


class Stage:
    """The terminal as a stage: a colour for each character, thoughts dim (or not shown), actions in italics."""

    COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")

    def __init__(self, scene, thoughts=True):
        self.cast, self.thoughts = [*scene.speaking_characters, ENVIRONMENT], thoughts
        actors = [name for name in scene.speaking_characters if name != ENVIRONMENT]
        self.styles = {name: f"bold {self.COLOURS[i % len(self.COLOURS)]}" for i, name in enumerate(actors)}
        self.shown = ""
        terminal.stdout.rule(
            Text(terminal.plain(scene.book)), style="dim"
        ) if terminal.stdout.is_terminal else terminal.put(scene.book + "\n")
        terminal.stdout.print(terminal.plain(scene.scenario) + "\n", style="italic", markup=False)

    def hear(self, call, said):
        """What has been spoken of a turn: what will surely stay of it is shown, so no line that may be another's."""
        *lines, line = said.split("\n")
        start = straighten(line).strip("-*#> \t").casefold()
        names = [straighten(name).casefold() for name in self.cast]
        after = r"[*\s]*(\([^)]*\)?\s*)?"
        beginning = any(
            name.startswith(start) or re.fullmatch(re.escape(name) + after, start) for name in names
        )
        sure = clean_reply("\n".join(lines) if beginning else said, call.agent, self.cast)
        self.put(call.agent, re.sub(r"\S+$", "", sure))  # whole words, so that they can be wrapped

    def show(self, message):
        """A turn as it is played."""
        if message["role"] != NEXT_SPEAKER:
            if not message["content"].startswith(self.shown):  # something in the middle has been cut since
                terminal.put("\n")
                self.shown = ""
            self.put(message["role"], message["content"])
            terminal.put("\n\n")
            self.shown = ""

    def put(self, name, text):
        """Shows how a turn goes on; nothing where the end of it has been cut since."""
        if not text.startswith(self.shown) or len(text) == len(self.shown):
            return
        if not self.shown:
            self.brackets, self.column = BracketParser(), cell_len(name) + 2
            terminal.put(f"{name}: ", self.styles.get(name, "dim"))
        for word in re.findall(r"\s+|\S+", text[len(self.shown) :]):
            spans = [span for span in self.brackets.feed(word) if self.thoughts or span[1] != THOUGHT]
            width = cell_len("".join(part for part, _ in spans))
            if terminal.stdout.is_terminal and self.column + width > terminal.stdout.width:
                terminal.put("\n")
                self.column = 0
                if word.isspace():
                    continue
            for part, channel in spans:
                terminal.put(part, "dim italic" if name == ENVIRONMENT else STYLES[channel])
            self.column = width if "\n" in word else self.column + width
        self.shown = text
