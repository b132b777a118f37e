"""Judges that come with the package."""

from pathlib import Path

SHIPPED = Path(__file__).parent / "shipped"


def shipped_judges() -> dict[str, Path]:
    """Model folders by name."""
    return {path.parent.name: path.parent for path in sorted(SHIPPED.glob("*/model.safetensors"))}


def named_judge(model: str | Path) -> Path:
    """The model folder that comes with the package under a name, or else the path itself."""
    return shipped_judges().get(str(model), Path(model).expanduser())
