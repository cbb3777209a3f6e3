"""What the quickstart is asked for, and where its files go."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "quickstart.yaml"

VOCABULARY = 2048
BLOCK = 128  # Tokens of a training example, and positions of both models.


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run.

    Attributes:
        output: The folder of everything that is written.
        seed: Of all weights and of the order of the data.
        steps: Of both students.
        teacher_steps: Of the teacher.
    """

    output: Path
    seed: int
    steps: int
    teacher_steps: int

    @property
    def train_text(self) -> Path:
        """The file of the training text."""
        return self.output / "train.txt"

    @property
    def eval_text(self) -> Path:
        """The file of the held-out text."""
        return self.output / "eval.txt"

    @property
    def teacher(self) -> Path:
        """The folder of the teacher and its tokenizer."""
        return self.output / "teacher"

    def student(self, name: str) -> Path:
        """The folder of a student."""
        return self.output / name
