"""The router's choice against a loop over tokens: ties, groups, bias, weights, counts; gradients by gradcheck."""

import pytest
import torch

from kernels.router_topk import RouterRule, router_topk

RULES = {
    "grouped sigmoid": RouterRule(4, "sigmoid", 4, 2, 2, True, 2.5),
    "one group kept": RouterRule(2, "sigmoid", 4, 1, 1, True, 1.0),
    "plain softmax": RouterRule(3, "softmax", 1, 1, 1, False, 1.0),
    "grouped softmax": RouterRule(2, "softmax", 3, 2, 1, False, 16.0),
}


def literal(logits, bias, rule):
    """Choices of each token, by Python's stable sort."""
    scores = logits.sigmoid() if rule.scoring == "sigmoid" else logits.softmax(-1)
    found = []
    for row in (scores if bias is None else scores + bias).tolist():
        size = len(row) // rule.n_group
        groups = [sum(sorted(row[g * size : (g + 1) * size])[-rule.group_best :]) for g in range(rule.n_group)]
        kept = sorted(range(rule.n_group), key=lambda g: -groups[g])[: rule.topk_group]
        reachable = [expert for expert in range(len(row)) if expert // size in kept]
        found.append(sorted(reachable, key=lambda expert: -row[expert])[: rule.top_k])
    return scores, torch.tensor(found)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_choice_weights_and_counts(name, biased, ties):
    rule = RULES[name]
    torch.manual_seed(0)
    logits, bias = torch.randn(20, 12), torch.randn(12) * 0.3 if biased else None
    if ties:
        logits = (logits > 0).float()
        bias = bias.round() if biased else None
    made = router_topk(logits, bias, rule, n_sequences=2)
    scores, ids = literal(logits, bias, rule)
    assert torch.equal(made.topk_ids, ids)
    torch.testing.assert_close(made.scores, scores)
    weights = scores.gather(1, ids)
    if rule.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(made.topk_weights, weights * rule.scaling)
    assert made.counts.tolist() == [torch.bincount(half.flatten(), minlength=12).tolist() for half in ids.chunk(2)]
    _, plain = literal(logits, None, rule)
    changed = sum(len(set(a) - set(b)) for a, b in zip(ids.tolist(), plain.tolist(), strict=True))
    assert made.changed.item() == changed
    assert not biased or changed > 0


@pytest.mark.parametrize("name", RULES)
def test_gradcheck_in_fp64(name):
    torch.manual_seed(0)
    logits = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)

    def op(logits):
        made = router_topk(logits, None, RULES[name])
        return made.topk_weights, made.scores

    assert torch.autograd.gradcheck(op, (logits,))


@pytest.mark.parametrize(
    ("rule", "sequences", "message"),
    [
        (RouterRule(4, "tanh"), 1, "use sigmoid or softmax"),
        (RouterRule(4, "sigmoid", 5, 2), 1, "n_group must divide them"),
        (RouterRule(7, "sigmoid", 4, 2), 1, "top_k 7 of 6 experts within reach"),
        (RouterRule(2, "sigmoid", 4, 2, 4), 1, "group_best 4 of 3"),
        (RouterRule(2, "sigmoid"), 3, "no 3 sequences"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(rule, sequences, message):
    with pytest.raises(ValueError, match=message):
        router_topk(torch.zeros(8, 12), None, rule, sequences)
