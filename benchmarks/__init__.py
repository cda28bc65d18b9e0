"""How fast is it, against whom, and how far from what the machine can do? One question a file; see README.md.

    python -m benchmarks.setup              once: the peers, in an environment of their own
    python -m benchmarks                    all questions, the table of targets, and the picture
    python -m benchmarks tokenize load      some of them

Run them from the root of the repository, as modules: `benchmarks/tokenize.py` must not be found in place of the
standard library's.
"""
