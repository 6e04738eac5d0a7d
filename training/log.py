"""What a user sees of a training run: `log.jsonl`, `loss.png`, the terminal, TensorBoard on request."""

from pathlib import Path

from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn

from common import terminal
from common.files import UsageError, append_line, read_lines, write_lines, write_whole

CURVES = {  # of loss.png: key in the log -> (label, style)
    "loss": ("training", dict(lw=1.2, zorder=3)),
    "loss_thought": ("thoughts", dict(lw=0.5, alpha=0.6)),
    "loss_action": ("actions", dict(lw=0.5, alpha=0.6)),
    "loss_speech": ("speech", dict(lw=0.5, alpha=0.6)),
    "eval_loss": ("held out", dict(marker="o", color="black")),
}


class Log:
    """The log of a run, on rank 0 only; a context manager, so that no error leaves a progress bar behind.

    done: the steps that the run has behind it; lines of later steps are cut off.
    """

    def __init__(self, out, steps, done=0, tensorboard=False):
        self.path, self.picture, self.steps = Path(out) / "log.jsonl", Path(out) / "loss.png", steps
        lines = read_lines(self.path, ("step",)) if done else []
        self.lines = [line for line in lines if line["step"] <= done]
        write_lines(self.path, self.lines)
        self.board = _open_tensorboard(out, done) if tensorboard else None
        columns = MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
        self.bar = terminal.progress(*columns)
        self.task = self.bar.add_task("training", total=steps, completed=done)

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()
        if self.board:
            self.board.close()

    def write(self, line):
        """Adds a step's values; returns None, or why they could not be written, for the ranks to agree on."""
        recent = [old["seconds"] for old in [*self.lines[-19:], line]]
        line["seconds_left"] = round(sum(recent) / len(recent) * (self.steps - line["step"]), 1)
        self.lines.append(line)
        try:
            append_line(self.path, line)
            self.show(line)
            if "eval_loss" in line:
                self.draw()
        except OSError as error:
            return f"{error.filename or self.path}: {error.strerror}; the checkpoints are not affected"

    def show(self, line):
        """Prints a step where it is due, and sends it to TensorBoard."""
        step, text = line["step"], describe(line)
        self.bar.update(self.task, completed=step, description=text)
        due = self.bar.disable and (step % 10 == 0 or step == 1)  # no terminal, so no bar
        if due or "eval_loss" in line:
            terminal.note(f"step {step}/{self.steps}  {text}  {line['seconds_left']:,.0f} s left")
        if "sample" in line:
            terminal.note(f"    {line['sample']}")
        if self.board:
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step":
                    self.board.add_scalar(name, value, step)
            if "sample" in line:
                self.board.add_text("sample", line["sample"], step)

    def draw(self):
        """Draws the loss curve."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for key, (label, style) in CURVES.items():
            points = [(line["step"], line[key]) for line in self.lines if line.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, **style)
        axes.set(xlabel="step", ylabel="loss, nats per supervised token")
        axes.grid(alpha=0.3)
        axes.legend()
        with write_whole(self.picture, "wb") as file:
            figure.savefig(file, format="png", dpi=130)
        plt.close(figure)


def describe(line):
    """A step in one line of text."""
    if line["loss"] is None:
        return "skipped: not finite"
    names = [name for name in ("thought", "action", "speech") if f"loss_{name}" in line]
    channels = ", ".join(f"{name} {line[f'loss_{name}']:.2f}" for name in names)
    parts = [f"loss {line['loss']:.3f}" + (f" ({channels})" if channels else "")]
    parts += [f"held out {line['eval_loss']:.3f}"] if line.get("eval_loss") is not None else []
    parts += [f"lr {line['lr']:.1e}", f"|g| {line['grad_norm']:.2f}"]
    parts += [f"{line['tokens_per_second']:,.0f} tok/s ({line['supervised_per_second']:,.0f} supervised)"]
    parts += [f"{line['mfu']:.1%} MFU"] if "mfu" in line else []
    return "  ".join([*parts, f"{line['peak_memory'] / 2**30:.1f} GiB"])


def _open_tensorboard(out, done):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard: not installed; pip install tensorboard, or omit the flag") from None
    return SummaryWriter(Path(out) / "tensorboard", purge_step=done + 1)
