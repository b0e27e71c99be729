"""Find the bundled configs/ and assets/ folders."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
ASSETS = ROOT / "assets"
