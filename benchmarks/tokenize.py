"""How long does it take to turn captions into token ids?"""

from .contest import Contest, difference


def run(contest: Contest) -> None:
    captions = {"texts": ["captions", contest.size(5000, 50)]}
    everybody = ("ours", "original", "tokenizers")
    contest.race("English, warm", "tokenize", dict.fromkeys(everybody, captions), difference, 0)
    contest.race("English, first pass", "tokenize_first", dict.fromkeys(everybody[:2], captions), difference, 0)
    for case, kind in {"noisy Unicode and HTML": "noisy", "every other one noisy": "mixed"}.items():
        noisy = {"texts": [kind, contest.size(2000, 50)]}
        contest.race(case, "tokenize", dict.fromkeys(everybody[:2], noisy), difference, 0)
