import torch

from longred_megatron.model.injection import inject_loss


def test_the_output_is_unchanged_and_both_gradients_reach_the_parameters() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    output = x * 2
    injected = inject_loss(output, 0.5 * x.square().sum())
    assert torch.equal(injected, output)
    downstream = torch.randn(4, 3)
    injected.backward(downstream)
    torch.testing.assert_close(x.grad, 2 * downstream + x.detach())
