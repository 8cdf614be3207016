"""Text from a prompt, ended by stop strings: what tasks and HumanEval ask of a model."""

from collections.abc import Sequence

from data.tokenizer import Tokenizer
from launch.harness import Complete
from model.generate import generate
from model.transformer import Transformer


def completer(model: Transformer, tokenizer: Tokenizer, window: int) -> Complete:
    """Writes with a model; the prompt begins a document, as in training. window: tokens of context at most."""

    def complete(prompt: str, *, stop: Sequence[str], max_new_tokens: int, temperature: float, seed: int) -> str:
        context = [tokenizer.eod_id, *tokenizer.encode(prompt).tolist()]
        new: list[int] = []
        text = ""
        for token in generate(model, context, max_new_tokens, temperature, seed, tokenizer.eod_id, window):
            new.append(token)
            text = tokenizer.decode(new)
            if any(word in text for word in stop):
                break
        ends = [text.find(word) for word in stop if word in text]
        return text[: min(ends)] if ends else text

    return complete
