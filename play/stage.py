"""The terminal as a stage: colours, styles, turns shown while they are spoken."""

import re

from rich.cells import cell_len
from rich.text import Text

from common import terminal
from data.brackets import ACTION, SPEECH, THOUGHT, BracketParser
from data.chats import NEXT_SPEAKER
from data.scenes import ENVIRONMENT
from play.replies import played_so_far

STYLES = {SPEECH: "", ACTION: "italic", THOUGHT: "dim"}  # of a message's channels on a terminal
COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")


class Stage:
    """Shows one scene: each character in a colour, actions in italics, thoughts dim or (False) not at all."""

    def __init__(self, scene, thoughts=True):
        self.cast, self.thoughts = [*scene.speaking_characters, ENVIRONMENT], thoughts
        actors = [name for name in scene.speaking_characters if name != ENVIRONMENT]
        self.styles = {name: f"bold {COLOURS[i % len(COLOURS)]}" for i, name in enumerate(actors)}
        self.shown = ""  # of the current turn
        if terminal.stdout.is_terminal:
            terminal.stdout.rule(Text(terminal.plain(scene.book)), style="dim")
            terminal.stdout.print(terminal.plain(scene.scenario) + "\n", style="italic", markup=False)
        else:
            terminal.put(f"{scene.book}\n{scene.scenario}\n\n")

    def on_text(self, call, text):
        """Shows a turn that is still being generated."""
        self.put(call.agent, played_so_far(text, call.agent, self.cast))

    def on_message(self, message):
        """Shows a turn as it is played."""
        if message["role"] == NEXT_SPEAKER:
            return
        if not message["content"].startswith(self.shown):  # what was shown has been cut since: begin anew
            terminal.put("\n")
            self.shown = ""
        self.put(message["role"], message["content"])
        terminal.put("\n\n")
        self.shown = ""

    def put(self, name, text):
        """Shows what a turn's text adds to what is shown of it; nothing if that is not its beginning."""
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
