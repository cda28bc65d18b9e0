"""Models of the Hugging Face hub, from a server of the test's own that speaks as much of its language as is needed."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import safetensors.torch
import torch
from conftest import TINY, filled

import clip
from clip.app.cli import main
from clip.checkpoints.convert import write_as
from clip.checkpoints.hub import fetch
from clip.checkpoints.released import DownloadError
from clip.config import RELEASED, CLIPConfig
from clip.model import config_of
from clip.training.options import TrainingOptions
from clip.training.run import prepare

huggingface_hub = pytest.importorskip("huggingface_hub")
LITTLE = TINY["vit"] | {"vocab_size": 40, "activation": "gelu", "vision_heads": 4}
JUNK = {"README.md": b"# A model", "model.fp16.safetensors": b"-", "tf_model.h5": b"-", "original/model.pt": b"-"}


@dataclass
class Repository:
    """The files of each commit, and which commit a branch or a tag is."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def push(self, files, *names):
        commit = hashlib.sha1(repr(sorted(files)).encode() + bytes([len(self.commits)])).hexdigest()
        self.commits[commit] = files
        self.names |= dict.fromkeys(names or ("main",), commit)
        return commit


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.command, self.path, self.headers["Authorization"]))
        api = self.path.startswith("/api/models/")
        if self.server.refusal and (api or not self.server.only_files_refused):
            status, code = self.server.refusal
            return self.answer(status, {"X-Error-Code": code} if code else {})
        owner, name, *rest = self.path.removeprefix("/api/models").strip("/").split("/")
        repository = self.server.repositories.get(f"{owner}/{name}")
        if repository is None:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if rest else "main"
        commit = repository.names.get(revision, revision)
        if commit not in repository.commits:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[commit]
        if api:
            about = {"id": f"{owner}/{name}", "sha": commit, "siblings": [{"rfilename": file} for file in files]}
            return self.answer(200, {"Content-Type": "application/json"}, json.dumps(about).encode())
        content = files.get("/".join(rest[2:]))
        if content is None:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return self.answer(200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}, content)

    do_HEAD = do_GET

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            if "/resolve/" in self.path:
                self.server.after_a_file()

    def log_message(self, *args):
        pass


class Hub(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.refusal: tuple[int, str | None] | None = None
        self.only_files_refused = False
        self.after_a_file = lambda: None

    def fetched(self):
        """The names of the files whose contents were asked for, since this was last called."""
        paths = [path for command, path, _ in self.requests if command == "GET" and "/resolve/" in path]
        self.requests.clear()
        return sorted(path.split("/", 5)[5] for path in paths)

    def repository(self, files, name="me/vit"):
        self.repositories[name] = Repository()
        self.repositories[name].push(files)
        return self.repositories[name]


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Set variables that huggingface_hub reads when it is imported, and have it read them again."""
    from huggingface_hub import constants

    def set_variables(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        importlib.reload(constants)

    with monkeypatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("HF_") or name.lower().endswith("_proxy"):
                patch.delenv(name)
        yield set_variables
        monkeypatch.undo()
    importlib.reload(constants)


@pytest.fixture
def hub(environment, tmp_path):
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        environment(HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HOME=str(tmp_path / "home"))
        yield hub
        hub.shutdown()


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The files of a model in each form, as bytes by name."""
    folder, model = tmp_path_factory.mktemp("forms"), filled(LITTLE)
    for form in ("huggingface", "open_clip"):
        write_as(form, folder / form, config_of(model), model.state_dict())
    whole = safetensors.torch.load_file(folder / "huggingface" / "model.safetensors")
    (folder / "sharded").mkdir()
    names = sorted(whole)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, members in shards.items():
        safetensors.torch.save_file({name: whole[name] for name in members}, folder / "sharded" / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("config.json", "preprocessor_config.json"):
        (folder / "sharded" / name).write_bytes((folder / "huggingface" / name).read_bytes())
    (folder / "pickle").mkdir()
    torch.save(whole, folder / "pickle" / "pytorch_model.bin")
    return {form.name: {path.name: path.read_bytes() for path in form.iterdir()} for form in folder.iterdir()}


def assert_is(model, salt=""):
    expected = filled(LITTLE, salt)
    assert config_of(model) == config_of(expected)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


# -- what is fetched --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["huggingface", "open_clip", "sharded"])
def test_what_is_needed_of_a_repository_is_fetched_and_no_more(hub, forms, form):
    hub.repository({**forms["pickle"], **JUNK, **forms[form]})
    model, _ = clip.load("hf-hub:me/vit", device="cpu")
    assert_is(model)
    assert hub.fetched() == sorted(forms[form])


def test_a_pickle_is_fetched_where_there_is_nothing_else(hub, forms):
    files = {name: content for name, content in forms["huggingface"].items() if name.endswith(".json")}
    hub.repository(files | forms["pickle"])
    assert_is(clip.load("hf-hub:me/vit", device="cpu")[0])
    assert "pytorch_model.bin" in hub.fetched()


def test_of_two_programs_files_the_form_that_a_folder_is_read_by_is_taken(hub, forms):
    hub.repository(forms["huggingface"] | forms["open_clip"])
    assert_is(clip.load("hf-hub:me/vit", device="cpu")[0])
    assert [name for name in hub.fetched() if name.endswith(".safetensors")] == ["open_clip_model.safetensors"]


def test_what_is_in_the_cache_is_not_fetched_again(hub, forms):
    hub.repository(forms["huggingface"])
    first = fetch("hf-hub:me/vit")
    assert hub.fetched()
    assert fetch("hf-hub:me/vit") == first
    assert not hub.fetched()


def test_the_cache_is_huggingface_hubs_or_the_one_that_is_named(hub, forms, tmp_path):
    hub.repository(forms["huggingface"])
    assert fetch("hf-hub:me/vit").is_relative_to(tmp_path / "home" / "hub" / "models--me--vit" / "snapshots")
    clip.load("hf-hub:me/vit", device="cpu", download_root=tmp_path / "mine")
    assert (tmp_path / "mine" / "models--me--vit" / "snapshots").is_dir()


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, forms, tmp_path):
    repository = hub.repository(forms["huggingface"])
    write_as("huggingface", tmp_path / "other", config_of(filled(LITTLE)), filled(LITTLE, "other").state_dict())
    other = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    commit = repository.push(other, "v2")
    for revision, salt in (("", ""), ("@main", ""), ("@v2", "other"), (f"@{commit}", "other")):
        assert_is(clip.load(f"hf-hub:me/vit{revision}", device="cpu")[0], salt)
    repository.push(other, "main")
    assert_is(clip.load("hf-hub:me/vit", device="cpu")[0], "other")


def test_what_is_pushed_meanwhile_is_not_mixed_in(hub, forms):
    repository = hub.repository(forms["huggingface"])
    hub.after_a_file = lambda: repository.push(forms["sharded"], "main")
    assert_is(clip.load("hf-hub:me/vit", device="cpu")[0])
    assert hub.fetched() == sorted(forms["huggingface"])


def test_the_token_goes_with_every_request_and_none_goes_without(hub, forms, environment):
    hub.repository(forms["huggingface"])
    fetch("hf-hub:me/vit")
    assert {token for _, _, token in hub.requests} == {None}
    hub.requests.clear()
    hub.repository(forms["open_clip"])
    environment(HF_TOKEN="hf_secret")
    fetch("hf-hub:me/vit")
    assert {token for _, _, token in hub.requests} == {"Bearer hf_secret"}


# -- without a connection ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["huggingface", "sharded"])
@pytest.mark.parametrize("way", ["HF_HUB_OFFLINE", "local_files_only"])
def test_offline_the_cache_is_all_there_is_and_nobody_is_asked(hub, forms, environment, form, way):
    hub.repository(forms[form])
    fetch("hf-hub:me/vit")
    hub.requests.clear()
    if way == "HF_HUB_OFFLINE":
        environment(HF_HUB_OFFLINE="1")
    assert_is(clip.load("hf-hub:me/vit", device="cpu", local_files_only=way == "local_files_only")[0])
    with pytest.raises(DownloadError, match=r"me/other is not in the cache, .*: local files only; load it once"):
        fetch("hf-hub:me/other", local_files_only=way == "local_files_only")
    assert not hub.requests


@pytest.mark.parametrize("why", ["gone", 503, 429])
def test_if_the_hub_does_not_answer_the_cache_has_to_do_and_that_is_said(hub, forms, environment, caplog, why):
    hub.repository(forms["huggingface"])
    folder = fetch("hf-hub:me/vit")
    if why == "gone":
        environment(HF_ENDPOINT="http://127.0.0.1:9")  # discard: nobody listens
    else:
        hub.refusal = (why, None)
    assert fetch("hf-hub:me/vit") == folder
    assert f"going on with what the cache has, {folder}" in caplog.text
    with pytest.raises(DownloadError, match=r"hf-hub:me/other is not in the cache, and cannot be had \(\w+: .+\)"):
        fetch("hf-hub:me/other")


# -- what cannot be had -----------------------------------------------------------------------------------------------


def test_a_repository_that_is_not_there_is_said_to_be_missing_or_private(hub):
    with pytest.raises(DownloadError, match=r"no repository http://127.*/me/none, or it is private; .*HF_TOKEN"):
        clip.load("hf-hub:me/none", device="cpu")


def test_a_revision_that_is_not_there_is_named(hub, forms):
    hub.repository(forms["huggingface"])
    with pytest.raises(DownloadError, match=r"me/vit@v9: the repository has no revision 'v9'; .*/tree/main lists"):
        clip.load("hf-hub:me/vit@v9", device="cpu")


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((401, "GatedRepo"), "not open to everybody; ask for access at .*/me/vit, then log in with `hf auth login`"),
        ((403, "GatedRepo"), "not open to everybody"),
        ((403, None), "not open to everybody"),
        ((401, "RepoNotFound"), "no repository .*, or it is private"),
        ((410, None), "the hub answered 410 for http"),
    ],
)
@pytest.mark.parametrize("only_files", [False, True])
def test_what_is_not_for_everybody_is_said_with_what_to_do(hub, forms, refusal, message, only_files):
    hub.repository(forms["huggingface"])
    hub.refusal, hub.only_files_refused = refusal, only_files
    with pytest.raises(DownloadError, match=f"hf-hub:me/vit: .*{message}"):
        clip.load("hf-hub:me/vit", device="cpu")


def test_a_repository_without_known_weights_says_what_was_looked_for(hub):
    hub.repository(JUNK)
    with pytest.raises(DownloadError, match=r"holds none of open_clip_model\.safetensors, .*load it by its path"):
        clip.load("hf-hub:me/vit", device="cpu")
    assert not hub.fetched()


@pytest.mark.parametrize("name", ["hf-hub:vit", "hf-hub:", "hf-hub:me/vit/model", "hf-hub:../secret", "hf-hub:me/@v2"])
def test_what_is_no_name_of_a_repository_is_refused(hub, name):
    with pytest.raises(ValueError, match='expected "hf-hub:OWNER/NAME" or "hf-hub:OWNER/NAME@REVISION", got'):
        clip.load(name, device="cpu")
    assert not hub.requests


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"needs huggingface_hub: pip install clip-from-scratch\[hub\]"):
        clip.load("hf-hub:me/vit", device="cpu")


# -- from the command line --------------------------------------------------------------------------------------------


def test_an_index_remembers_the_repository(hub, tmp_path, capsys):
    clip.save(filled(TINY["vit"]), tmp_path / "model.safetensors")
    hub.repository({"model.safetensors": (tmp_path / "model.safetensors").read_bytes()})
    main(["draw", "--count", "2", "-o", str(tmp_path / "drawn")])
    index = str(tmp_path / "x.clipindex")
    assert main(["index", str(tmp_path / "drawn"), "-o", index, "--model", "hf-hub:me/vit", "--device", "cpu"]) == 0
    assert main(["search", "a cat", "--index", index, "--device", "cpu"]) == 0, capsys.readouterr().err


def test_verify_fetches_only_when_it_is_told_to_and_a_folder_is_not_the_released_file(hub, forms, monkeypatch, capsys):
    hub.repository(forms["huggingface"])
    monkeypatch.setitem(RELEASED, "ViT-B/16", CLIPConfig(**LITTLE))
    assert main(["verify", "hf-hub:me/vit", "--device", "cpu"]) == 2
    assert "Or fetch it now: clip verify hf-hub:me/vit --download" in capsys.readouterr().err
    assert not hub.requests
    assert main(["verify", "hf-hub:me/vit", "--device", "cpu", "--download"]) == 1
    assert "measured  none, as this is a folder" in capsys.readouterr().out


def test_a_process_of_its_own_reads_the_environment(hub, forms, tmp_path):
    hub.repository(forms["huggingface"])
    command = [sys.executable, "-m", "clip", "convert", "hf-hub:me/vit", str(tmp_path / "x"), "--to", "open_clip"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loaded again, it embeds as hf-hub:me/vit does" in done.stdout
    assert_is(clip.load(tmp_path / "x", device="cpu")[0])


def test_training_begins_from_a_model_of_the_hub(hub, forms):
    hub.repository(forms["huggingface"])
    options = TrainingOptions(captions=("drawn",), init="hf-hub:me/vit", device="cpu")
    assert_is(prepare(options).model)


@pytest.mark.parametrize(
    "command",
    [
        ["classify", "x.png", "--labels", "a", "b", "--model", "hf-hub:me/none"],
        ["train", "drawn", "--init", "hf-hub:me/none"],
    ],
    ids=lambda command: command[0],
)
def test_what_cannot_be_had_is_one_sentence(hub, capsys, command):
    assert main(command) == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"clip {command[0]}: hf-hub:me/none: there is no repository http")
