import hashlib
import importlib.metadata
import json
import os
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import clip
from clip.app import doctor
from clip.app.cli import main

SETUP = (Path(__file__).parent.parent / "setup.py").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def healthy(tmp_path, monkeypatch):
    """An empty cache, no proxies, no other `clip`, whatever the machine is like."""
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path))
    for variable in (*doctor.CERTIFICATES, "CLIP_BASE_URL", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(doctor, "getproxies", dict)
    monkeypatch.setattr(doctor, "sys", SimpleNamespace(path=[], version_info=sys.version_info))
    monkeypatch.setattr(importlib.metadata, "packages_distributions", dict)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=8 << 30))
    monkeypatch.setattr(doctor, "_try_out", lambda device: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def examine(capsys, *options):
    """The exit code, and what was found by topic and name."""
    code = main(["doctor", "--json", *options])
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return code, {(finding["topic"], finding["what"]): finding for finding in findings}


def problems(findings):
    return [key for key, finding in findings.items() if finding["problem"]]


def test_a_sound_installation_has_nothing_wrong(capsys):
    code, findings = examine(capsys)
    assert (code, problems(findings)) == (0, [])
    assert findings["package", "clip"]["found"] == f"{clip.__version__} from {Path(clip.__file__).parent}"
    assert findings["versions", "torch"]["found"] == importlib.metadata.version("torch")
    assert f"{torch.get_num_threads()} threads" in findings["devices", "cpu"]["found"]
    assert all(name in findings["weights", "not here"]["found"] for name in clip.clip._MODELS)


def test_people_read_the_same_as_programs(capsys):
    _, findings = examine(capsys)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(finding["found"] in text for finding in findings.values())
    assert text.endswith("\nnothing is wrong\n")


def test_the_embedded_model_is_really_run(monkeypatch):
    monkeypatch.undo()
    assert doctor._try_out("cpu") is None
    assert "RuntimeError: there is no device cuda:63 here" in doctor._try_out("cuda:63")


def test_a_device_that_fails_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_try_out", lambda device: "it is on fire")
    code, findings = examine(capsys)
    assert (code, problems(findings)) == (1, [("devices", name) for topic, name in findings if topic == "devices"])
    main(["doctor"])
    out = capsys.readouterr().out
    assert "  !! it is on fire\n" in out
    assert re.search(r"\n\d+ (is|are) wrong\n$", out)


@pytest.mark.parametrize("name", ["clip.py", "clip/__init__.py"])
def test_another_package_of_the_name_is_wrong(healthy, capsys, name):
    (healthy / name).parent.mkdir(exist_ok=True)
    (healthy / name).write_text("")
    code, findings = examine(capsys)
    assert (code, problems(findings)) == (1, [("package", "another clip")])
    assert findings["package", "another clip"]["found"] == str(healthy / name.removesuffix("/__init__.py"))


def test_ours_on_the_path_twice_is_not_another(monkeypatch, capsys):
    ours = Path(clip.__file__).parent
    monkeypatch.setattr(doctor.sys, "path", [str(ours.parent), str(ours), "/no/such/folder"])
    assert problems(examine(capsys)[1]) == []


def test_openais_package_beside_ours_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"clip": [doctor.NAME, "pip"]})
    code, findings = examine(capsys)
    assert (code, problems(findings)) == (1, [("package", "another clip")])
    assert "pip uninstall pip" in findings["package", "another clip"]["problem"]


def test_a_command_of_another_python_is_wrong(monkeypatch, capsys):
    scripts = doctor.sysconfig.get_path("scripts")
    for command, wrong in [(f"{scripts}/clip", False), ("/windows/system32/clip.exe", True)]:
        monkeypatch.setattr(doctor.shutil, "which", {"clip": command}.get)
        assert (("package", "command") in problems(examine(capsys)[1])) == wrong


def test_an_old_or_missing_dependency_is_wrong(monkeypatch, capsys):
    versions = {"torch": "2.5.1+cu124", "pillow": "11.0.0"}
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "ftfy" else versions.get(name, "1.0"))
    _, findings = examine(capsys)
    assert problems(findings) == [("versions", "torch"), ("versions", "ftfy")]
    assert "pip install -U torch" in findings["versions", "torch"]["problem"]


def test_what_is_required_is_what_setup_says():
    required = re.search(r"install_requires=\[(.*?)\]", SETUP)[1]
    stated = [f"{name}>={least}" if least else name for name, least in doctor.REQUIRED.items()]
    assert stated == re.findall(r'"(.*?)"', required)
    assert 'python_requires=">={}.{}"'.format(*doctor.PYTHON) in SETUP


def test_numbers_of_versions_compare():
    assert doctor._numbers("2.13.0+cpu") > doctor._numbers("2.6")
    assert doctor._numbers("2.6.0a1+git123") >= doctor._numbers("2.6")
    assert doctor._numbers("11") == (11,)


@pytest.fixture
def released(healthy, monkeypatch):
    """A table of two models, of which one is in the cache."""
    with zipfile.ZipFile(healthy / "RN50.pt", "w") as file:
        file.writestr("data", b"x" * 5000)
    digest = hashlib.sha256((healthy / "RN50.pt").read_bytes()).hexdigest()
    table = {"RN50": f"https://host/{digest}/RN50.pt", "ViT-B/32": f"https://host/{'0' * 64}/ViT-B-32.pt"}
    monkeypatch.setattr(doctor, "MODELS", table)
    return healthy / "RN50.pt"


def test_a_sound_file_is_found_sound_and_an_absent_one_is_named(released, capsys):
    code, findings = examine(capsys)
    assert (code, problems(findings)) == (0, [])
    assert findings["weights", "RN50"]["found"] == "0 MiB, sha256 as released"
    assert findings["weights", "not here"]["found"].startswith("ViT-B/32;")


def test_a_changed_byte_is_found_unless_it_is_to_be_quick(released, capsys):
    content = bytearray(released.read_bytes())
    content[1000] ^= 1
    released.write_bytes(content)
    code, findings = examine(capsys)
    assert (code, problems(findings)) == (1, [("weights", "RN50")])
    assert f"{released} was cut short or is another file" in findings["weights", "RN50"]["problem"]
    code, findings = examine(capsys, "--quick")
    assert (code, findings["weights", "RN50"]["found"]) == (0, "0 MiB, not hashed")


def test_a_file_cut_short_is_found_even_in_a_hurry(released, capsys):
    released.write_bytes(released.read_bytes()[:3000])
    code, findings = examine(capsys, "--quick")
    assert (code, problems(findings)) == (1, [("weights", "RN50")])


@pytest.mark.parametrize("options", [[], ["--quick"]])
def test_a_file_that_cannot_be_read_is_not_called_damaged(released, capsys, options):
    released.unlink()
    released.mkdir()
    code, findings = examine(capsys, *options)
    assert code == 1
    assert findings["weights", "RN50"]["problem"].startswith("cannot be read: ")


def test_a_download_under_way_is_told(released, capsys):
    (released.parent / "ViT-B-32.pt.part").write_bytes(bytes(3 << 20))
    code, findings = examine(capsys)
    assert code == 0
    assert findings["weights", "ViT-B/32"]["found"].startswith("3 MiB of a download")
    assert ("weights", "not here") not in findings


def test_a_cache_that_is_a_file_and_a_full_disk_are_wrong(healthy, monkeypatch, capsys):
    (healthy / "file").write_text("")
    monkeypatch.setenv("CLIP_CACHE", str(healthy / "file"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    assert problems(examine(capsys)[1]) == [("weights", "cache"), ("weights", "free disk")]


def test_a_folder_that_may_not_be_looked_into_is_wrong_and_no_crash(healthy, monkeypatch, capsys):
    (healthy / "locked").mkdir()
    monkeypatch.setenv("CLIP_CACHE", str(healthy / "locked" / "clip"))
    monkeypatch.setattr(doctor.sys, "path", [str(healthy / "locked" / "packages")])
    inside, stat = str(healthy / "locked") + os.sep, os.stat

    def forbidden(path, **options):
        if str(path).startswith(inside):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", forbidden)  # root may look into everything
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, findings = examine(capsys)
    assert (code, problems(findings)) == (1, [("weights", "cache")])


def test_a_cache_that_is_not_there_yet_is_not_wrong(healthy, monkeypatch, capsys):
    monkeypatch.setenv("CLIP_CACHE", str(healthy / "not" / "yet"))
    code, findings = examine(capsys)
    assert code == 0
    assert findings["weights", "cache"]["found"].endswith("not there yet")


def test_proxies_are_shown_without_their_passwords(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "getproxies", lambda: {"https": "http://me:secret@proxy:3128", "no": "localhost"})
    monkeypatch.setenv("CLIP_BASE_URL", "https://me:secret@mirror/clip")
    code, findings = examine(capsys)
    assert code == 0
    assert findings["network", "https proxy"]["found"] == "http://***@proxy:3128"
    assert findings["network", "CLIP_BASE_URL"]["found"] == "https://***@mirror/clip"
    assert "secret" not in str(findings)


def test_certificates_that_are_gone_are_wrong(healthy, monkeypatch, capsys):
    monkeypatch.setenv("SSL_CERT_FILE", str(healthy / "gone.pem"))
    assert problems(examine(capsys)[1]) == [("network", "SSL_CERT_FILE")]


def test_extras_are_read_from_what_is_installed(monkeypatch, capsys):
    class Installed:
        metadata = SimpleNamespace(get_all=lambda name: ["draw", "search"])
        requires = (
            "torch>=2.6",
            'pip; extra == "draw"',
            'no-such-thing>=2 ; extra == "search"',
            "pip; extra == 'search'",
        )

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed)
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "no-such-thing" else "99")
    code, findings = examine(capsys)
    assert code == 0  # what is optional may be absent
    assert findings["extras", "[draw]"]["found"] == "all there"
    assert findings["extras", "[search]"]["found"] == f"without no-such-thing: pip install {doctor.NAME}[search]"
