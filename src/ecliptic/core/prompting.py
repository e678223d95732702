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

from ecliptic.core.contracts import Features, Tokens
from ecliptic.core.encoder import HFEncoder


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


def with_context(encoder: HFEncoder, context: Tensor, tokens: Tokens) -> tuple[Tensor, Tokens]:
    """Put learnt context vectors behind the first special token (CoOp, arXiv 2109.01134): "[start] v1 ... vM name . [end]".

    context: (M, W) shared, or (B, M, W) one per caption. tokens: captions without the context. Returns embeddings and the tokens
    to give to `text_from_embeddings`. ValueError if a caption and its context exceed what the tower reads.
    """
    batch, length = tokens.ids.shape
    context = context.expand(batch, *context.shape[-2:]) if context.ndim == 2 else context
    count = context.shape[1]
    tower = encoder.anatomy.text
    words = token_embeddings(encoder, tokens)
    head = 0 if tower.padded else 1  # SigLIP's captions start with a word, not a special token
    longest = int(tokens.mask.sum(-1).max())
    if longest + count > encoder.max_tokens:
        raise ValueError(
            f"{count} context vectors and {longest} tokens exceed the {encoder.max_tokens} that {encoder.name} reads"
        )
    embeddings = torch.cat([words[:, :head], context.to(words), words[:, head:]], 1)
    ids, mask = tokens.ids.to(encoder.device), tokens.mask.to(encoder.device)
    # What stands in the ids at the context's place is never read, but must not look like an end of text.
    filler = ids[:, :head] if head else torch.zeros_like(ids[:, :1])
    ids = torch.cat([ids[:, :head], filler.expand(batch, count), ids[:, head:]], 1)
    mask = torch.cat([mask[:, :head], mask.new_ones(batch, count), mask[:, head:]], 1)
    keep = min(length + count, encoder.max_tokens)  # towers padded to full length lose padding, never words
    return embeddings[:, :keep], Tokens(ids[:, :keep], mask[:, :keep])


def images_with_prompts(
    encoder: HFEncoder, pixels: Tensor, prompts: Tensor | None, deep: Mapping[int, Tensor] | None = None, **options: Any
) -> Features:
    """Run the image tower with extra tokens behind its patches (VPT, arXiv 2203.12119).

    prompts: (P, W) or (B, P, W), or None. deep: {block: prompts of the same shape} replaces them at that block's input. The
    prompts are dropped after the last block, so pooling and patch features see the picture's own tokens only.
    options: those of `Encoder.images`. With no prompts the result is that of `Encoder.images`.
    """
    if prompts is None:
        if deep:
            raise ValueError("deep prompts replace shallow ones: give `prompts` too")
        return encoder.images(pixels, **options)
    tower, count = encoder.anatomy.image, prompts.shape[-2]
    for layer, prompt in (deep or {}).items():
        if prompt.shape[-2] != count:
            raise ValueError(f"block {layer} has {prompt.shape[-2]} deep prompts, {count} are needed")
    with ExitStack() as stack:
        stack.enter_context(_output(tower.embed, lambda seen: torch.cat([seen, _rows(prompts, seen)], 1)))
        for layer, prompt in (deep or {}).items():
            stack.enter_context(_input(tower.blocks[layer], _replace(-count, prompt)))
        stack.enter_context(_output(tower.blocks[-1], lambda seen: seen[:, :-count]))
        return encoder.images(pixels, **options)


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
