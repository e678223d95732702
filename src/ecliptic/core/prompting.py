"""Run a tower on embeddings instead of inputs: soft, deep and visual prompts for every kind of tower.

The towers themselves are not touched and not re-written. For the length of one call, hooks hand the token table's output (text)
or the patch embeddings (image) over from the caller and swap prompt positions between blocks, so masks, positions,
pooling and projection stay the checkpoint's own, and gradients flow into the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ecliptic.core.contracts import Features, Tokens
from ecliptic.core.encoder import Encoder, HFEncoder


def token_embeddings(encoder: HFEncoder, tokens: Tokens) -> Tensor:
    """Tokens (B, L) -> (B, L, W): what the text tower's table holds for them, before positions are added."""
    table = encoder.anatomy.text.table
    assert table is not None
    return table(tokens.ids.to(encoder.device))


def text_from_embeddings(
    encoder: HFEncoder,
    embeddings: Tensor,
    tokens: Tokens,
    deep: Mapping[int, tuple[int, Tensor]] | None = None,
    **options: Any,
) -> Features:
    """Run the text tower on embeddings.

    embeddings: (B, L, W), read in place of the table's rows. tokens: (B, L) of the same layout; its ids say where the text ends
    (which is where CLIP pools) and its mask which positions exist. deep: {block: (start, prompt (P, W) or (B, P, W))} replaces
    the positions start .. start + P of that block's input (deep prompts, MaPLe/VPT style). options: those of `Encoder.texts`.
    With the table's own rows the result is that of `Encoder.texts`.
    """
    if embeddings.shape[:2] != tokens.ids.shape:
        raise ValueError(
            f"embeddings {tuple(embeddings.shape[:2])} and tokens {tuple(tokens.ids.shape)} differ in batch or length"
        )
    tower = encoder.anatomy.text
    assert tower.table is not None
    with ExitStack() as stack:
        # The encoder may trim padding it has seen to be useless: follow it.
        stack.enter_context(_output(tower.table, lambda seen: embeddings[:, : seen.shape[1]]))
        for layer, (start, prompt) in (deep or {}).items():
            stack.enter_context(_input(tower.blocks[layer], _replace(start, prompt)))
        return encoder.texts(tokens, **options)


@contextmanager
def added_to_words(encoder: HFEncoder, addition: Tensor) -> Iterator[None]:
    """While open, the text tower reads its table's rows plus `addition`, position by position, special tokens and padding too.

    addition: (L, W) for all captions, or (B, L, W), one for each of a batch of B. Positions beyond L are read as they are, and
    what is added beyond the end of a batch is not read. With zeros the tower says what it said.
    """
    tower = encoder.anatomy.text
    assert tower.table is not None

    def add(seen: Tensor) -> Tensor:
        length = min(seen.shape[1], addition.shape[-2])
        missing = seen.shape[1] - length
        return seen + pad(addition[..., :length, :].to(seen), (0, 0, 0, missing))

    with _output(tower.table, add):
        yield


def with_context(
    encoder: HFEncoder, context: Tensor, tokens: Tokens, after: Tensor | None = None, *, tail: int = 0
) -> tuple[Tensor, Tokens]:
    """Put learnt vectors around the words of captions: "[start] v1 ... vM name u1 ... uA . [end]".

    The v stand behind the first special token (CoOp, arXiv 2109.01134), or first of all where captions start with a word
    (SigLIP); the u, if there are any, before the end of text and the `tail` tokens in front of it (1 for a full stop).

    context: (M, W) shared, or (B, M, W) one per caption; after: (A, W) or (B, A, W) likewise; M and A may be 0. tokens: captions
    without either. Returns embeddings and the tokens to give to `text_from_embeddings`. ValueError if a caption and its
    context exceed what the tower reads, or a caption has no more than `tail` words.
    """
    batch, length = tokens.ids.shape
    ids, mask = tokens.ids.to(encoder.device), tokens.mask.to(encoder.device)
    words = token_embeddings(encoder, tokens)
    before = _rows(context, words)
    after = words[:, :0] if after is None else _rows(after, words)
    added, count = before.shape[1] + after.shape[1], before.shape[1]
    longest = int(mask.sum(-1).max())
    if longest + added > encoder.max_tokens:
        raise ValueError(
            f"{added} context vectors and {longest} tokens exceed the {encoder.max_tokens} that {encoder.name} reads"
        )
    head = 0 if encoder.anatomy.text.padded else 1  # SigLIP's captions start with a word, not a special token

    # Where each place of the result comes from, in [words, v, u].
    place = torch.arange(length + added, device=ids.device).expand(batch, -1)
    source = torch.where(place < head, place, length + place - head)  # v
    source = torch.where(place >= head + count, place - count, source)  # words
    if after.shape[1]:
        stop = (_words_end(encoder, ids, mask) - tail)[:, None]
        if bool((stop <= head).any()):
            raise ValueError(f"tail={tail}: caption {int((stop <= head).nonzero()[0, 0])} has no word in front of that")
        source = torch.where(place >= stop + count, length + place - stop, source)  # u
        source = torch.where(place >= stop + added, place - added, source)  # what follows them

    row = torch.arange(batch, device=ids.device)[:, None]
    embeddings = torch.cat([words, before, after], 1)[row, source]
    # What stands in the ids at the context's place is never read, but must not look like an end of text.
    filler = ids[:, :1] if head else torch.zeros_like(ids[:, :1])
    ids = torch.cat([ids, filler.expand(batch, added)], 1)[row, source]
    mask = torch.cat([mask, mask.new_ones(batch, added)], 1)[row, source]
    keep = min(length + added, encoder.max_tokens)  # towers padded to full length lose padding, never words
    return embeddings[:, :keep], Tokens(ids[:, :keep], mask[:, :keep])


def _words_end(encoder: HFEncoder, ids: Tensor, mask: Tensor) -> Tensor:
    """(B,): the place behind the last word of each caption, that of its end of text where it has one."""
    end = mask.sum(-1)
    if encoder.tokenizer is None:
        return end - 1
    special = torch.tensor(encoder.tokenizer.all_special_ids, device=ids.device)
    return end - torch.isin(ids.gather(1, (end - 1)[:, None])[:, 0], special).long()


def images_with_prompts(
    encoder: HFEncoder,
    pixels: Tensor,
    prompts: Tensor | None,
    deep: Mapping[int, Tensor] | None = None,
    *,
    normed: bool = True,
    **options: Any,
) -> Features:
    """Run the image tower with extra tokens behind its patches (VPT, arXiv 2203.12119).

    prompts: (P, W) or (B, P, W), or None. deep: {block: prompts of the same shape} replaces them at that block's input.
    normed: CLIP's tower has a LayerNorm between embeddings and first block; True puts the prompts before it, so that they are
    normalised like patches (VPT's own place), False behind it. Towers without one treat both alike.
    Attention does not know the order of its tokens, so behind the patches is as good as between class token and patches. The
    prompts are dropped after the last block: pooling and patch features see the picture's own tokens only.
    options: those of `Encoder.images`. With no prompts the result is that of `Encoder.images`. Raises as `check_promptable`.
    """
    if prompts is None or prompts.shape[-2] == 0:
        if deep:
            raise ValueError("deep prompts replace shallow ones: give `prompts` too")
        return encoder.images(pixels, **options)
    check_promptable(encoder, image=True)
    tower, count = encoder.anatomy.image, prompts.shape[-2]
    for layer, prompt in (deep or {}).items():
        if prompt.shape[-2] != count:
            raise ValueError(f"block {layer} has {prompt.shape[-2]} deep prompts, {count} are needed")

    def join(seen: Tensor) -> Tensor:
        return torch.cat([seen, _rows(prompts, seen)], 1)

    with ExitStack() as stack:
        stack.enter_context(_output(tower.embed, join) if normed else _input(tower.blocks[0], join))
        for layer, prompt in (deep or {}).items():
            stack.enter_context(_input(tower.blocks[layer], _replace(-count, prompt)))
        stack.enter_context(_output(tower.blocks[-1], lambda seen: seen[:, :-count]))
        return encoder.images(pixels, **options)


def check_promptable(encoder: Encoder, *, image: bool = False) -> HFEncoder:
    """The encoder, if prompts can be put into its text tower and, with `image`, into its image tower; else TypeError.

    An exported model has no layers to put them between. The joined picture tower of "offline" pools a convolutional network:
    prompts among the patches of the transformer beside it would change no answer.
    """
    if not isinstance(encoder, HFEncoder):
        raise TypeError(f"{type(encoder).__name__} takes no prompts, it only answers: load what it was made from")
    if image and encoder.anatomy.image.joined:
        raise TypeError(
            f"visual prompts have no effect on {encoder.name}: its pooled vector comes from a convolutional network, which "
            "takes no prompts; learn textual ones, or choose a model whose picture tower is a transformer (such as 'tiny')"
        )
    return encoder


def _rows(prompt: Tensor, like: Tensor) -> Tensor:
    return prompt.to(like).expand(len(like), *prompt.shape[-2:])


def _replace(start: int, prompt: Tensor) -> Callable[[Tensor], Tensor]:
    def change(hidden: Tensor) -> Tensor:
        at = start % hidden.shape[1]
        rows = _rows(prompt, hidden)
        return torch.cat([hidden[:, :at], rows, hidden[:, at + rows.shape[1] :]], 1)

    return change


@contextmanager
def _output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if inputs:
            return (change(inputs[0]), *inputs[1:]), named
        return inputs, {**named, "hidden_states": change(named["hidden_states"])}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
