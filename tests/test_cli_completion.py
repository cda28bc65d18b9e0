import builtins
import shutil
import subprocess

import pytest

from clip.app.cli import main


def rules(shell, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", shell])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_every_shell_learns_the_commands_and_their_options(shell, capsys):
    pytest.importorskip("shtab")
    text = rules(shell, capsys)
    assert all(word in text for word in ("classify", "doctor", "embed", "held-out"))


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_commands_options_and_files(tmp_path, capsys):
    pytest.importorskip("shtab")
    (tmp_path / "clip.bash").write_text(rules("bash", capsys))
    (tmp_path / "picture.png").write_bytes(b"")

    def complete(*words):
        quoted = " ".join(f"'{word}'" for word in words)
        script = f"""source clip.bash; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}
            _shtab_clip clip "{words[-1]}" "{words[-2]}" 2>/dev/null; printf '%s\\n' "${{COMPREPLY[@]}}" """
        answer = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
        return answer.stdout.split()

    assert complete("clip", "clas") == ["classify"]
    assert complete("clip", "doctor", "--qu") == ["--quick"]
    assert complete("clip", "embed", "pic") == ["picture.png"]
    assert complete("clip", "embed", "--texts", "pic") == ["picture.png"]


def test_without_shtab_one_sentence_says_how_to_get_it(monkeypatch, capsys):
    original = builtins.__import__

    def absent(name, *rest):
        if name == "shtab":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", "bash"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "clip: --print-completion needs shtab: pip install clip-from-scratch[completion]\n"
    )
