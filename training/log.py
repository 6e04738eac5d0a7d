"""What one sees of a training run: `log.jsonl`, `loss.png`, the terminal, and TensorBoard where it is asked for."""

from pathlib import Path

from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn

from common import terminal
from common.files import UsageError, append_line, read_lines, write_lines, write_whole


class Log:
    """A line a step, for machines and for people; only rank 0 has one. `kept`: the steps a run goes on from."""

    def __init__(self, out, steps, kept=0, tensorboard=False):
        self.path, self.picture, self.steps = Path(out) / "log.jsonl", Path(out) / "loss.png", steps
        lines = read_lines(self.path, ("step",)) if kept else []
        self.lines = [line for line in lines if line["step"] <= kept]
        write_lines(self.path, self.lines)
        self.board = _open_tensorboard(out, kept) if tensorboard else None
        self.bar = terminal.progress(
            MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
        )
        self.task = self.bar.add_task("training", total=steps, completed=kept)
        self.bar.start()

    def write(self, line):
        """Adds a step's line; `seconds_left` goes by the last twenty."""
        recent = [each["seconds"] for each in [*self.lines[-19:], line]]
        line["seconds_left"] = round(sum(recent) / len(recent) * (self.steps - line["step"]), 1)
        self.lines.append(line)
        append_line(self.path, line)
        text = self.text(line)
        self.bar.update(self.task, completed=line["step"], description=text)
        if (
            "eval_loss" in line
            or "sample" in line
            or (self.bar.disable and (line["step"] % 10 == 0 or line["step"] == 1))
        ):
            terminal.note(f"step {line['step']}/{self.steps}  {text}  {line['seconds_left']:,.0f} s left")
        if "sample" in line:
            terminal.note(f"    {line['sample']}")
        if self.board:
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step":
                    self.board.add_scalar(name, value, line["step"])
            if "sample" in line:
                self.board.add_text("sample", line["sample"], line["step"])

    @staticmethod
    def text(line):
        """A step in one line of text."""
        if line["loss"] is None:
            return "skipped: not finite"
        channels = [
            f"{name} {line[f'loss_{name}']:.2f}"
            for name in ("thought", "action", "speech")
            if f"loss_{name}" in line
        ]
        parts = [f"loss {line['loss']:.3f}" + (f" ({', '.join(channels)})" if channels else "")]
        parts += [f"held out {line['eval_loss']:.3f}"] if line.get("eval_loss") is not None else []
        parts += [f"lr {line['lr']:.1e}", f"|g| {line['grad_norm']:.2f}"]
        parts += [f"{line['tokens_per_second']:,.0f} tok/s ({line['supervised_per_second']:,.0f} learnt)"]
        parts += [f"{line['mfu']:.1%} MFU"] if "mfu" in line else []
        return "  ".join([*parts, f"{line['peak_memory'] / 2**30:.1f} GiB"])

    def draw(self):
        """The loss curve as a picture, renewed as the run goes."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        names = {
            "loss": "training",
            "loss_thought": "thoughts",
            "loss_action": "actions",
            "loss_speech": "speech",
        }
        for key, label in {**names, "eval_loss": "held out"}.items():
            points = [(line["step"], line[key]) for line in self.lines if line.get(key) is not None]
            style = {"eval_loss": dict(marker="o", color="black"), "loss": dict(lw=1.2, zorder=3)}
            if points:
                axes.plot(*zip(*points, strict=True), label=label, **style.get(key, dict(lw=0.5, alpha=0.6)))
        axes.set(xlabel="step", ylabel="loss, nats per supervised token")
        axes.grid(alpha=0.3)
        axes.legend()
        with write_whole(self.picture, "wb") as file:
            figure.savefig(file, format="png", dpi=130)
        plt.close(figure)

    def close(self):
        self.bar.stop()
        if self.board:
            self.board.close()


def _open_tensorboard(out, kept):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "--tensorboard: it is not installed; pip install tensorboard, or leave the flag out"
        ) from None
    return SummaryWriter(Path(out) / "tensorboard", purge_step=kept + 1)
