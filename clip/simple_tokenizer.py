r"""Byte-level BPE: a caption becomes a list of ids, the only thing that the text tower ever sees of it.

Source: Sennrich et al. (1508.07909) §3.2, the merge rule; Radford et al. 2019 (GPT-2) §2.2, bytes as the base symbols;
Radford et al. (2103.00020) §2.4, lower-cased text, and Table 18, 49,408 ids (49,152 in §2.4: each byte counted once).
Differs from GPT-2: text is repaired and lower-cased first; white space is not kept, a mark on the last symbol of each
word, `</w>`, takes its place. So ids decode to words with a space after each, not to the caption as it was written.

One caption on its way:

    "A  Caf&eacute;&rsquo;s CORGIS!"
      │  basic_clean             ftfy repairs broken Unicode, HTML entities are resolved, quotes made straight
    "A  Café's CORGIS!"
      │  lower, split            white space separates chunks
    "a"  "café's"  "corgis!"
      │  pat                     words: letters, one digit, anything else, or an English 's 't 're 've 'm 'll 'd
    "a"  "café" "'s"  "corgis" "!"
      │  byte_encoder            UTF-8; each of the 256 bytes has a printable character that stands for it
    "a"  "cafÃ©" "'s"  "corgis" "!"
      │  bpe                     letters grow together, the pair learned earliest first
    "a</w>"  "cafÃ©</w>" "'s</w>"  "cor" "gis</w>" "!</w>"
      │  encoder
    320  15304 568  851 12773 256

`clip.tokenize` puts the start token 49406 before these ids, the end token 49407 behind them, and pads with 0.
"""

import gzip
import html
import re
from collections.abc import Iterable
from hashlib import sha256
from heapq import heapify, heappop, heappush
from itertools import islice, pairwise, takewhile
from pathlib import Path
from unicodedata import is_normalized

import ftfy
import regex
from ftfy.badness import is_bad
from ftfy.fixes import uncurl_quotes

_SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
_MERGES = 49_408 - 2 * 256 - len(_SPECIAL_TOKENS)  # 48,894; the published file lists 2¹⁸

# sha256 of the header and the merges that CLIP uses, unpacked. In this list every symbol, taken apart and merged anew,
# comes back whole, so that a word which is a symbol needs no merging; lists in general do not promise that.
_RELEASED = "685491abbdad36159d094ecdc23bebc0dd53f8d1df35c4d74ef6036db2ba7572"

# Each cache holds at most so many entries, of keys at most so many characters long: a few dozen MB together.
_CACHE_ENTRIES, _CACHE_KEY = 2**16, 32


def default_bpe() -> str:
    """Return the path of the merge list that comes with the package."""
    here = Path(__file__).resolve().parent
    name = "bpe_simple_vocab_16e6.txt.gz"
    installed, checkout = here / "bpe_vocab" / name, here.parent / "bpe_vocab" / name
    return str(installed if installed.exists() else checkout)


class SimpleTokenizer:
    """CLIP's tokenizer: text to ids and back.

    Parameters
    ----------
    bpe_path : str
        A gzipped list of merges, one pair of symbols a line after a header line. Both the list that comes with the
        package and the longer one that OpenAI published will do.

    Attributes
    ----------
    byte_encoder, byte_decoder : dict
        Byte to the character that stands for it, and back.
    encoder, decoder : dict
        Symbol to id, and back. 0-255 are the bytes, 256-511 the bytes at a word's end, 512-49405 the merges in the
        order in which they were learned, 49406 and 49407 the start and the end token.
    bpe_ranks : dict
        Pair of symbols to its place in that order.
    pat : regex.Pattern
        What counts as a word.
    cache : dict
        Words that `bpe` has seen, as it returned them.
    """

    def __init__(self, bpe_path: str = default_bpe()):
        with gzip.open(bpe_path) as lines:
            listing = b"".join(islice(lines, 1 + _MERGES))
        merges = [tuple(line.split()) for line in listing.decode("utf-8").split("\n")[1:] if line]

        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {character: byte for byte, character in self.byte_encoder.items()}
        symbols = list(self.byte_encoder.values())
        symbols += [character + "</w>" for character in symbols]
        symbols += ["".join(pair) for pair in merges]
        symbols += _SPECIAL_TOKENS
        self.encoder = {symbol: i for i, symbol in enumerate(symbols)}
        self.decoder = dict(enumerate(symbols))
        self.bpe_ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.pat = regex.compile(
            r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
        )
        self.cache = {token: token for token in _SPECIAL_TOKENS}
        self._chunk_ids: dict[str, tuple[int, ...]] = {}
        self._whole_words = self.encoder if sha256(listing).hexdigest() == _RELEASED else {}

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """Turn a caption into ids, without start and end token.

        Parameters
        ----------
        text : str
            Any text; case and white space make no difference.
        allow_special : bool
            Whether `<|startoftext|>` and `<|endoftext|>` in the text, in any case, become the tokens 49406 and 49407,
            as they do in the released code. The text tower reads no further than an end token, so whoever writes one
            into a caption decides where it stops: pass False for text from others, and they are plain text.

        Returns
        -------
        list of int
        """
        text = basic_clean(text).lower()
        if not allow_special:
            text = _SPECIAL.sub(r"<| \1 |>", text)  # the words that `pat` finds in it if it knows no special tokens
        ids: list[int] = []
        for chunk in text.split():  # no word crosses white space
            ids += self._chunk_ids.get(chunk) or self._encode_chunk(chunk)
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Turn ids back into text: lower case, a space after each word, U+FFFD for bytes that are no UTF-8.

        Parameters
        ----------
        ids : iterable of int
            A list, or a row of what `clip.tokenize` returns.
        skip_special_tokens : bool
            Whether to read as the text tower does: the first end token ends the caption, what follows it is padding,
            and start and end are left out. (A 0 before the end is kept: it is a `!` that does not end a word.)

        Raises
        ------
        KeyError
            If an id is not in the vocabulary.
        """
        tokens = (self.decoder[int(i)] for i in ids)
        if skip_special_tokens:
            start, end = _SPECIAL_TOKENS
            tokens = (token for token in takewhile(lambda token: token != end, tokens) if token != start)
        text = bytes(self.byte_decoder[character] for character in "".join(tokens))
        return text.decode("utf-8", errors="replace").replace("</w>", " ")

    def bpe(self, token: str) -> str:
        """Return the symbols that a word is made of, with spaces between them.

        The word is written in the characters of `byte_encoder`. It starts as single characters, and of all the pairs of
        neighbours the one learned earliest is merged, again and again:

            c o r g i s</w>     o r    has rank 11
            c or g i s</w>      i s</w>      21
            c or g is</w>       c or        339
            cor g is</w>        g is</w>  12261
            cor gis</w>         this pair was never learned
        """
        if token in self.cache:
            return self.cache[token]
        if token + "</w>" in self._whole_words:
            symbols = token + "</w>"
        else:
            symbols = " ".join(_merge([*token[:-1], token[-1] + "</w>"], self.bpe_ranks))
        if len(self.cache) < _CACHE_ENTRIES and len(token) <= _CACHE_KEY:
            self.cache[token] = symbols
        return symbols

    def _encode_chunk(self, chunk: str) -> list[int]:
        """Return the ids of clean, lower-cased text without white space, and remember them."""
        ids: list[int] = []
        one_word = chunk.isascii() and chunk.isalpha()
        for word in [chunk] if one_word else self.pat.findall(chunk):
            whole = self._whole_words.get(word + "</w>") if word.isascii() else None  # ASCII stands for itself
            if whole is not None:
                ids.append(whole)
            else:
                token = "".join([self.byte_encoder[byte] for byte in word.encode("utf-8")])
                ids += [self.encoder[symbol] for symbol in self.bpe(token).split(" ")]
        if len(chunk) <= _CACHE_KEY:
            if len(self._chunk_ids) >= _CACHE_ENTRIES:
                self._chunk_ids.clear()
            self._chunk_ids[chunk] = tuple(ids)
        return ids


_SPECIAL = regex.compile(r"<\|(startoftext|endoftext)\|>", regex.IGNORECASE)


def basic_clean(text: str) -> str:
    """Repair broken Unicode, resolve HTML entities (doubly escaped ones too), and strip the ends.

    Almost all captions need none of it, and finding that out is much faster than doing it for nothing.
    """
    if _DISTURBING.search(text) or not (text.isascii() or (is_normalized("NFC", text) and not is_bad(text))):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    elif not text.isascii():
        text = uncurl_quotes(text)  # the one repair that ordinary text needs often
    return text.strip()


# What ftfy or html.unescape may change wherever it stands. Any other text ftfy changes only if it is not in the normal
# form NFC or looks like UTF-8 decoded as something else, `is_bad`; but for quotes, and straight ones turn no text bad.
_DISTURBING = re.compile(
    "["
    "\x00-\x08\x0b\x0d-\x1f\x7f-\x9f"  # control characters, and the line break \r
    "\u2028\u2029\u206a-\u206f\ufeff\ufff9-\ufffc"  # more line breaks and invisible characters
    "\ud800-\udfff"  # surrogates
    "\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06"  # Latin ligatures
    "\u3000\uff01-\uffef"  # full-width and half-width forms
    "\xc2\xc3"  # is_bad looks whether these begin a line, and ftfy splits the lines first
    "]"
    r"|&(?![ \t\n\f<&;]|\Z)"  # an entity, maybe
)


def whitespace_clean(text: str) -> str:
    """Make each run of white space one space, and strip the ends."""
    return regex.sub(r"\s+", " ", text).strip()


def bytes_to_unicode() -> dict[int, str]:
    """Return for each byte a printable character that stands for it; the order is that of the ids 0-255.

    Bytes that are visible in Latin-1 stand for themselves and come first; the other 68 take U+0100, U+0101, ... So all
    text can be spelled, no symbol is unknown, and a list of merges is a text file in which a space can separate.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def get_pairs(word: Iterable[str]) -> set[tuple[str, str]]:
    """Return the pairs of neighbours in a sequence of symbols."""
    return set(pairwise(word))


def _merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merge all occurrences of the pair with the lowest rank, from left to right, until no pair has a rank.

    Looking through the word for every merge takes a time that grows with the square of its length. So the symbols are
    a linked list, each at the place of its first character, and the places of pairs wait in a heap.
    """
    # One None stands behind the last symbol and, being symbols[-1], before the first: its pairs have no rank.
    symbols = [*symbols, None]
    before = list(range(-1, len(symbols) - 1))
    after = list(range(1, len(symbols) + 1))
    waiting = [(ranks[pair], left) for left, pair in enumerate(pairwise(symbols)) if pair in ranks]
    heapify(waiting)
    while waiting:
        rank = waiting[0][0]
        places = []
        while waiting and waiting[0][0] == rank:
            places.append(heappop(waiting)[1])
        for left in places:
            right = after[left]
            if ranks.get((symbols[left], symbols[right])) != rank:
                continue  # one of the two has been merged into another symbol since
            merged = symbols[left] = symbols[left] + symbols[right]
            symbols[right] = None
            previous, following = before[left], after[right]
            after[left], before[following] = following, left
            if (new := ranks.get((symbols[previous], merged))) is not None:
                heappush(waiting, (new, previous))
            if (new := ranks.get((merged, symbols[following]))) is not None:
                heappush(waiting, (new, left))
    return [symbol for symbol in symbols if symbol is not None]
