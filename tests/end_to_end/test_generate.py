"""`trimtab generate` on a trained run: rounded weights, drafts of the run's own and of a second run, bad seconds."""

import json
from pathlib import Path

from launch.cli import main


def test_completes_in_every_way(trimtab, config: Path, tmp_path: Path, capsys) -> None:
    runs = {}
    for name, changes in (("run", ()), ("small", ("model.num_hidden_layers=1", "model.num_nextn_predict_layers=0"))):
        runs[name] = str(tmp_path / name)
        arguments = ["train", str(config), *changes, "--launcher", "debug", "--no-summary", "--run", runs[name]]
        assert main([*arguments, "train.steps=2"]) == 0
    capsys.readouterr()

    def generate(*options: str) -> tuple[list[str], dict]:
        prompts = ["--prompt", "def ", "--prompt", "größe = "]
        assert main(["generate", runs["run"], *prompts, "--max-new-tokens", "40", "--json", *options]) == 0
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        return [one["text"] for one in said["completions"]], said

    plain, said = generate("--temperature", "0")
    assert said["acceptance"] is None and said["step"] == 2
    assert 0 < said["new_tokens"] <= 80  # a text may end before its 40 tokens
    for second in ("mtp", runs["small"]):
        drafted, said = generate("--temperature", "0", "--speculative", second)
        assert drafted == plain and said["drafted"] > 0
    rounded, said = generate("--quantize", "int8", "--speculative", "mtp", "--top-p", "0.9", "--batch", "1")
    assert said["weights"]["bytes_after"] < 0.7 * said["weights"]["bytes_before"]
    assert len(rounded) == 2

    assert main(["generate", runs["small"], "--speculative", "mtp"]) == 2
    assert "the run's model has no prediction module" in capsys.readouterr().err
    assert main(["generate", runs["run"], "--context", "5000"]) == 2
    assert "--context 5000 exceeds model.max_position_embeddings = 4096" in capsys.readouterr().err
