"""Read the calibration text of a run, and say how much it is at most before it is read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from mmquant.errors import InputError
from mmquant.monitor import current

from .options import TextOptions

if TYPE_CHECKING:
    from ..calibration.text.corpus import Corpus
    from ..convert.source import Source

HIGH = 4  # times as many windows with --effort high
Text = TypeVar("Text", bound=TextOptions)


def at_effort(options: Text) -> Text:
    """The options as the text is read: high effort of error feedback reads HIGH times as many windows."""
    return replace(options, windows=options.windows * HIGH) if reads_more(options) else options


def reads_more(options: TextOptions) -> bool:
    """Whether this is high effort of GPTQ or of a GGUF file (AWQ's adds error feedback instead)."""
    return getattr(options, "effort", None) == "high" and getattr(options, "method", "gptq") == "gptq"


def say_if_short(options: TextOptions, corpus: Corpus) -> None:
    """Say so when high effort found no more text than default effort reads; options as they were given."""
    found = len(corpus.tokens)
    if reads_more(options) and found <= windows_at_most(options):
        said = f"--effort high reads {HIGH} times as many windows, but the text holds only {found}"
        current().message(f"{said}, which default effort reads too; more --text would gain")


def make_corpus(source: Source, options: TextOptions) -> Corpus:
    """Read, check and pack the calibration text; bundled text goes with it as far as `generic_at_most` says."""
    from ..calibration.text.chat import load_template
    from ..calibration.text.corpus import DEFAULT, pack_windows, read_sets
    from ..calibration.text.generic import generic_windows, together
    from ..calibration.text.overlap import check_disjoint
    from ..calibration.text.tokenizer import load_tokenizer

    context = context_of(source, options)
    tokenizer, template, notes = load_tokenizer(source), load_template(source), []
    sets = read_sets(list(options.text), template, notes)
    for note in notes:
        current().message(note)
    corpus = pack_windows(sets, tokenizer, context, options.windows, options.seed)
    if generic_at_most(options):
        more = read_sets([DEFAULT], template)
        extra = pack_windows(more, tokenizer, context, generic_windows(len(corpus.tokens)), options.seed)
        corpus = together(corpus, extra)
    held = read_sets(list(options.evaluation), template, side="evaluation")
    check_disjoint(((d.origin, d.parts()) for part in held for d in part.documents), corpus.seen)
    return corpus


def check_texts(options: TextOptions) -> None:
    """InputError for a text that is not there, before anything is read: what a dry run can say of texts."""
    from ..calibration.text.corpus import check_specs

    check_specs(options.text)
    check_specs(options.evaluation, "evaluation")


def generic_at_most(options: TextOptions) -> int:
    """Windows of the bundled text that go with the user's own: none where it is part of that already, or unwanted."""
    from ..calibration.text.corpus import DEFAULT
    from ..calibration.text.generic import generic_windows

    texts = [spec.partition("=")[0] for spec in options.text]
    mixed = texts and DEFAULT not in texts and not options.text_only
    return generic_windows(options.windows) if mixed else 0


def windows_at_most(options: TextOptions) -> int:
    """Windows of the calibration text, the bundled part included, as far as that is known without reading it."""
    return options.windows + generic_at_most(options)


def context_of(source: Source, options: TextOptions) -> int:
    """Tokens in a window. InputError for more than the model takes."""
    longest = source.geometry.max_context
    context = options.context or (512 if longest < 8192 else 2048)
    if context > longest:
        raise InputError(f"--context {context}: the model has at most {longest}")
    return int(context)


def tokens_at_most(source: Source, options: TextOptions) -> int:
    """Tokens of the calibration text, as far as that is known without reading it."""
    return context_of(source, options) * windows_at_most(options)
