"""Nano CLIP: "Learning Transferable Visual Models From Natural Language Supervision" in one file.

    python examples/nano_clip.py                  about two minutes on two CPU cores
    python examples/nano_clip.py --steps 50       a glance

Pictures of coloured shapes go in, with captions. What comes out finds the right one of 80 sentences for a picture,
often even for the twenty of which it has never seen a picture nor read a caption. Read it from top to bottom with the
paper open (Radford et al., 2103.00020): §2.2 pairs, §2.4 towers, §2.3 objective, §2.5 training, §3.1 zero-shot. Only
the tokenizer comes from the package.

    picture          (N, 3, 32, 32)  ──  ImageTower  ──  (N, E)  ┐
                                                                 ├─  logits (N, N): which caption is whose?
    "a red circle"   (N, 12)         ──  TextTower   ──  (N, E)  ┘
"""

import argparse
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import nn
from tqdm import trange

from clip import tokenize

R, P = 32, 8  # the side of a picture and of a patch, in pixels
L, V = 12, 49408  # ids in a caption, with start and end token; ids there are
D, LAYERS, HEADS = 128, 3, 4  # of both towers
E = 64  # the joint space

# §2.2  Pairs. The paper took 400 million from the internet; ours are drawn.

COLOURS = ("red", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "turquoise")


def corners(count: int, *radii: float) -> np.ndarray:
    """Points around 0, the first on top, at distances that take turns. Complex: real is right, imaginary is down."""
    return np.resize(radii, count) * -1j * np.exp(2j * np.pi * np.arange(count) / count)


t = np.linspace(0, 2 * np.pi, 40)
SHAPES = {  # outlines of about the size of the unit circle
    "circle": corners(40, 0.85),
    "square": corners(4, 1) * np.exp(0.25j * np.pi),
    "triangle": corners(3, 1),
    "star": corners(10, 1, 0.42),
    "heart": np.sin(t) ** 3 - 1j * (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16,
    "cross": corners(12, 0.45, 1, 1) * np.exp(0.25j * np.pi),
    "moon": np.concatenate([np.exp(1j * (0.9 + 0.71 * t)), 0.4 + 0.87 * np.exp(1j * (5.1 - 0.65 * t))]),
    "arrow": np.array([-1j, 0.9 - 0.1j, 0.35 - 0.1j, 0.35 + 1j, -0.35 + 1j, -0.35 - 0.1j, -0.9 - 0.1j]),
}
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
HELD_OUT = [(c, s) for i, c in enumerate(COLOURS) for j, s in enumerate(SHAPES) if (i + j) % 4 == 0]  # never trained
TRAINED = [pair for pair in PAIRS if pair not in HELD_OUT]
SENTENCES = ("a {} {}", "a picture of a {} {}", "there is a {} {}")


def draw(colour: str, shape: str, rng: np.random.Generator) -> Image.Image:
    """One picture. Place, size, angle, shade and background are as chance has it, since no caption speaks of them."""
    background = rng.integers(90, 190) + rng.integers(-25, 26, 3)
    shade = np.clip(ImageColor.getrgb(colour) + rng.integers(-20, 21, 3), 0, 255)
    size, angle = rng.uniform(0.3, 0.48), rng.uniform(-0.25, 0.25)  # half a side; radians
    across, down = rng.uniform(size, 1 - size, 2)
    outline = 4 * R * (across + 1j * down + size * np.exp(1j * angle) * SHAPES[shape])
    canvas = Image.new("RGB", (4 * R, 4 * R), tuple(background.tolist()))
    ImageDraw.Draw(canvas).polygon([(point.real, point.imag) for point in outline], tuple(shade.tolist()))
    return canvas.reduce(4)  # drawn four times too large, so that edges are smooth


def read(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures as the image tower takes them: (N, 3, R, R), in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1


def batch(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Every trained pair once, drawn and worded anew: no caption comes twice, so no right answer counts as wrong."""
    captions = [rng.choice(SENTENCES).format(*pair) for pair in TRAINED]
    return read([draw(*pair, rng) for pair in TRAINED]), tokenize(captions, context_length=L)


# §2.4  Two towers, both transformers (Vaswani et al., 1706.03762; for pictures, Dosovitskiy et al., 2010.11929).


class Block(nn.Module):
    """Positions exchange what they know, then each works on it alone; both is added to what was there."""

    def __init__(self, causal: bool):
        super().__init__()
        self.causal = causal
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.ln_1(x))  # ViT Eq. 2
        return x + self.mlp(self.ln_2(x))  # ViT Eq. 3

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (N, L, D) -> 3 x (N, H, L, d)
        scores = q @ k.transpose(-2, -1) / math.sqrt(D / HEADS)  # (N, H, L, L): what each position wants of each
        if self.causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1) > 0, -math.inf)  # nothing from later ones
        heads = scores.softmax(dim=-1) @ v  # Vaswani Eq. 1
        return self.out(heads.transpose(1, 2).flatten(2))  # (N, H, L, d) -> (N, L, D)


class ImageTower(nn.Module):
    """A Vision Transformer: a picture is a sentence whose words are its patches."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, D, kernel_size=P, stride=P)  # one linear map for every square of P x P pixels
        self.class_embedding = nn.Parameter(0.02 * torch.randn(D))  # a word more, which gathers what the picture shows
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(1 + (R // P) ** 2, D))
        self.blocks = nn.Sequential(*[Block(causal=False) for _ in range(LAYERS)])
        self.ln, self.projection = nn.LayerNorm(D), nn.Linear(D, E, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)  # (N, 3, R, R) -> (N, G², D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, D), x], dim=1) + self.positional_embedding  # ViT Eq. 1
        x = self.blocks(x)  # (N, 1 + G², D)
        return self.projection(self.ln(x[:, 0]))  # (N, E)


class TextTower(nn.Module):
    """A transformer in which no position looks ahead, read out where the text ends."""

    def __init__(self):
        super().__init__()
        self.token_embedding = nn.Embedding(V, D)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(L, D))
        self.blocks = nn.Sequential(*[Block(causal=True) for _ in range(LAYERS)])
        self.ln, self.projection = nn.LayerNorm(D), nn.Linear(D, E, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """What each position knows of itself and of those before it: (N, L) -> (N, L, D)."""
        return self.ln(self.blocks(self.token_embedding(ids) + self.positional_embedding))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        end = ids.argmax(dim=-1)  # the end token has the highest id, and it has read the whole text
        return self.projection(self.tokens(ids)[torch.arange(len(ids)), end])  # (N, E)


class NanoCLIP(nn.Module):
    """Both towers, and the temperature between them: Fig. 3."""

    def __init__(self):
        super().__init__()
        self.image_tower, self.text_tower = ImageTower(), TextTower()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # §2.5: as a logarithm, it stays positive

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.image_tower(images), dim=-1)  # (N, E), unit length

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.text_tower(ids), dim=-1)  # (N, E), unit length

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.logit_scale.exp() * self.encode_image(images) @ self.encode_text(ids).T  # (N, N), rows are pictures


# §2.3  The objective: which caption belongs to which picture, and which picture to which caption?


def clip_loss(logits: torch.Tensor) -> torch.Tensor:
    """Cross entropy along the rows and along the columns of (N, N); the right answers are on the diagonal."""
    answers = torch.arange(len(logits))
    return (F.cross_entropy(logits, answers) + F.cross_entropy(logits.T, answers)) / 2


# §2.5  Training: Adam with decoupled weight decay, a warm-up, half a cosine, and a cap on the scale.


def train(steps: int, lr: float = 1e-3, warmup: int = 50) -> NanoCLIP:
    """Learn from `steps` batches."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = NanoCLIP()
    decaying = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]  # gains, biases, the temperature
    groups = [{"params": decaying, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)
    progress = trange(1, steps + 1, desc="training", unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / warmup) * (1 + math.cos(math.pi * step / steps)) / 2
        loss = clip_loss(model(*batch(rng)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        if step % 100 == 0 or step == steps:
            progress.write(f"step {step:4}  loss {loss.item():.3f} (by chance {math.log(len(TRAINED)):.3f})")
    return model.eval()


# §3.1  Zero-shot: sentences make a classifier, also of what was never shown.


@torch.no_grad()
def classifier(model: NanoCLIP, pairs: list[tuple[str, str]]) -> torch.Tensor:
    """A unit vector for each pair, (K, E): the mean of what its sentences give (§3.1.4)."""
    texts = [sentence.format(*pair) for pair in pairs for sentence in SENTENCES]
    vectors = model.encode_text(tokenize(texts, context_length=L))
    return F.normalize(vectors.unflatten(0, (len(pairs), -1)).mean(dim=1), dim=-1)


@torch.no_grad()
def ask(model: NanoCLIP, pairs: list[tuple[str, str]], times: int = 20) -> tuple[float, float, float]:
    """Draw each pair so often, and choose among all 80. How often is it right; how often the colour; the shape?"""
    rng = np.random.default_rng(1)
    asked = [pair for pair in pairs for _ in range(times)]
    cosines = model.encode_image(read([draw(*pair, rng) for pair in asked])) @ classifier(model, PAIRS).T  # (M, 80)
    chosen = [PAIRS[i] for i in cosines.argmax(dim=1)]
    right = np.array([(a == b, a[0] == b[0], a[1] == b[1]) for a, b in zip(chosen, asked, strict=True)])
    return tuple(right.mean(axis=0).tolist())


@torch.no_grad()
def draw_matrix(model: NanoCLIP, pairs: list[tuple[str, str]], side: int = 48, left: int = 150) -> Image.Image:
    """A picture of each pair, on top, beside a caption of each pair, on the left; their cosines in the cells."""
    rng = np.random.default_rng(2)
    pictures = [draw(*pair, rng) for pair in pairs]
    cosines = classifier(model, pairs) @ model.encode_image(read(pictures)).T  # (K, K)
    sheet = Image.new("RGB", (left + len(pairs) * side, side + len(pairs) * side), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, pair in enumerate(pairs):
        sheet.paste(pictures[i].resize((side, side)), (left + i * side, 0))
        pen.text((left - 8, (i + 1.5) * side), SENTENCES[0].format(*pair), "black", font, anchor="rm")
        for j, cosine in enumerate(cosines[i].tolist()):
            x, y = left + j * side, (i + 1) * side
            pen.rectangle((x, y, x + side, y + side), f"hsl(210, 60%, {100 - 55 * max(0, cosine):.0f}%)")
            pen.text((x + side / 2, y + side / 2), f"{cosine:.2f}", "black", font, anchor="mm")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="batches to learn from (default: 1000)")
    parser.add_argument("--out", default="nano_clip.png", help="the picture to write (default: nano_clip.png)")
    options = parser.parse_args()

    model = train(options.steps)
    print("| pictures of | right, of 80 | colour, of 10 | shape, of 8 |\n|---|---:|---:|---:|")
    for name, pairs in (("trained pairs", TRAINED), ("pairs never trained", HELD_OUT)):
        print(f"| {name} |", " | ".join(f"{share:.1%}" for share in ask(model, pairs)), "|")
    print(f"| by chance | {1 / len(PAIRS):.1%} | {1 / len(COLOURS):.1%} | {1 / len(SHAPES):.1%} |")
    draw_matrix(model, HELD_OUT[::2]).save(options.out)


if __name__ == "__main__":
    main()
