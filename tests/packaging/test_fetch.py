"""The pinned tree arrives whole and verified, or not at all. pip is a stand-in here."""

import hashlib
import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import fetch
import pytest

ARCHIVED_AT = 1_600_000_000
PIP = """
import os, pathlib, shutil, sys
answer = os.environ["STAND_IN_PIP"]
if answer.startswith("fail:"):
    sys.exit(answer.removeprefix("fail:"))
shutil.copy(answer, sys.argv[sys.argv.index("--dest") + 1])
"""


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Return a source package with the layout of the real one."""
    path = tmp_path / "made" / "package-1.0.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name, text in (
            ("vendor/llama.cpp/include/llama.h", "// llama.h"),
            ("vendor/llama.cpp/models/a.inp", "golden"),
            ("vendor/llama.cpp/.git", "gitdir: ../../elsewhere"),
            ("pyproject.toml", "not ours"),
        ):
            member = tarfile.TarInfo(f"package-1.0/{name}")
            member.size, member.mtime = len(text), ARCHIVED_AT
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def pin(archive: Path) -> fetch.Pin:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return fetch.Pin("abc", "0.1", "package", "1.0", digest, "vendor/llama.cpp")


@pytest.fixture
def tree(tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where the tree shall go; the cache is empty and pip serves the archive."""
    stand_in = tmp_path / "stand_in"
    (stand_in / "pip").mkdir(parents=True)
    (stand_in / "pip" / "__init__.py").touch()
    (stand_in / "pip" / "__main__.py").write_text(PIP)
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(stand_in))
    monkeypatch.setenv("STAND_IN_PIP", str(archive))
    monkeypatch.setenv("LLAMA_CRAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "third_party").mkdir()
    return tmp_path / "third_party" / "llama.cpp"


def test_tree_is_whole_stamped_and_keeps_its_times(tree: Path, pin: fetch.Pin) -> None:
    assert fetch.ensure_tree(tree=tree, pin=pin) == tree
    assert (tree / "include" / "llama.h").read_text() == "// llama.h"
    assert (tree / "include" / "llama.h").stat().st_mtime == ARCHIVED_AT
    assert not (tree / ".git").exists()
    assert (tree / fetch.STAMP).read_text() == pin.stamp
    assert [path.name for path in tree.parent.iterdir()] == ["llama.cpp"]


def test_second_call_needs_neither_pip_nor_cache(
    tree: Path, pin: fetch.Pin, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch.ensure_tree(tree=tree, pin=pin)
    before = (tree / fetch.STAMP).stat().st_mtime_ns
    monkeypatch.setenv("STAND_IN_PIP", "fail:pip was called")
    monkeypatch.setenv("LLAMA_CRAB_CACHE", str(tree.parent / "no-cache"))
    fetch.ensure_tree(tree=tree, pin=pin)
    assert (tree / fetch.STAMP).stat().st_mtime_ns == before


def test_cached_archive_serves_another_tree_offline(
    tree: Path, pin: fetch.Pin, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch.ensure_tree(tree=tree, pin=pin)
    monkeypatch.setenv("STAND_IN_PIP", "fail:offline")
    other = fetch.ensure_tree(tree=tree.parent / "other", pin=pin)
    assert (other / "include" / "llama.h").is_file()


def test_damaged_cached_archive_is_fetched_again(tree: Path, pin: fetch.Pin) -> None:
    cached = fetch.cache_dir() / "sources" / pin.sha256 / "package-1.0.tar.gz"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half a download")
    fetch.ensure_tree(tree=tree, pin=pin)
    assert hashlib.sha256(cached.read_bytes()).hexdigest() == pin.sha256


def test_wrong_archive_is_refused_and_not_kept(tree: Path, pin: fetch.Pin) -> None:
    wrong = replace(pin, sha256="0" * 64)
    with pytest.raises(fetch.FetchError, match=f"sha256 is {pin.sha256}, the pin says 0000"):
        fetch.ensure_tree(tree=tree, pin=wrong)
    assert not tree.exists()
    assert not list(fetch.cache_dir().rglob("*.tar.gz"))


@pytest.mark.parametrize("words", ["Network is unreachable", "No module named pip"])
def test_failure_says_why_and_what_to_do(
    tree: Path, pin: fetch.Pin, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setenv("STAND_IN_PIP", f"fail:{words}")
    with pytest.raises(fetch.FetchError, match=words) as caught:
        fetch.ensure_tree(tree=tree, pin=pin)
    assert "LLAMA_CPP_DIR" in str(caught.value)
    assert str(fetch.cache_dir() / "sources" / pin.sha256) in str(caught.value)
    assert not tree.exists()


def test_interrupted_unpacking_leaves_nothing(
    tree: Path, pin: fetch.Pin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_extract", stop)
    with pytest.raises(KeyboardInterrupt):
        fetch.ensure_tree(tree=tree, pin=pin)
    assert list(tree.parent.iterdir()) == []


def test_a_tree_of_the_users_own_is_never_replaced(tree: Path, pin: fetch.Pin) -> None:
    tree.mkdir()
    (tree / "work.cpp").write_text("mine")
    with pytest.raises(fetch.FetchError, match="LLAMA_CPP_DIR="):
        fetch.ensure_tree(tree=tree, pin=pin)
    assert (tree / "work.cpp").read_text() == "mine"


def test_another_pin_replaces_our_tree(tree: Path, pin: fetch.Pin) -> None:
    fetch.ensure_tree(tree=tree, pin=pin)
    (tree / "left_over.cpp").touch()
    newer = replace(pin, commit="def")
    fetch.ensure_tree(tree=tree, pin=newer)
    assert (tree / fetch.STAMP).read_text() == newer.stamp
    assert not (tree / "left_over.cpp").exists()


def test_pruned_tree_suffices_until_the_full_one_is_asked_for(tree: Path, pin: fetch.Pin) -> None:
    fetch.ensure_tree(tree=tree, pin=pin)
    (tree / "models" / "a.inp").unlink()
    (tree / "models").rmdir()
    fetch.ensure_tree(tree=tree, pin=pin)
    assert not (tree / "models").exists()
    fetch.ensure_tree(tree=tree, pin=pin, full=True)
    assert (tree / "models" / "a.inp").read_text() == "golden"


def test_llama_cpp_dir_is_taken_as_it_is(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    monkeypatch.setenv("LLAMA_CPP_DIR", str(own))
    with pytest.raises(fetch.FetchError, match=r"not a llama\.cpp tree"):
        fetch.ensure_tree(tree=tree)
    (own / "include").mkdir(parents=True)
    (own / "include" / "llama.h").touch()
    assert fetch.ensure_tree(tree=tree) == own.resolve()
    assert os.listdir(own) == ["include"]


def test_the_pin_in_the_repository_is_complete() -> None:
    pin = fetch.read_pin()
    assert len(pin.sha256) == 64
    assert len(pin.commit) >= 9
    assert pin.package
    assert pin.version
