"""Rules of the source tree that no linter knows."""

import subprocess
from pathlib import Path

# In pieces, so that this file does not break the rule it checks.
REGISTRIES = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("anaconda", "org"),
        ("crates", "io"),
        ("registry", "npmjs"),
        ("ghcr", "io"),
        ("docker", "io"),
    )
]


def test_setup_py_stays_readable(root: Path) -> None:
    assert len((root / "setup.py").read_text(encoding="utf-8").splitlines()) <= 150


def test_no_tracked_file_names_a_package_registry(root: Path) -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    files = [root / name for name in listed.split("\0") if name]
    assert root / "pyproject.toml" in files
    found = []
    for path in files:
        text = path.read_bytes().decode("utf-8", errors="ignore") if path.is_file() else ""
        found += [(path.name, host) for host in REGISTRIES if host in text]
    assert not found
