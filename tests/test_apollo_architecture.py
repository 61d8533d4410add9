"""The `apollo` architecture: parametrised as in Apollo's library, saved as SAELens' `standard`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sae_lens import SAE, StandardSAE, TrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from sae_lens_e2e import ApolloTrainingSAE, ApolloTrainingSAEConfig
from tests.models import random_tokens
from tests.training import make_runner, make_trainer, runner_config

D_IN, D_SAE = 16, 40
LAMBDA = 0.3
pytestmark = pytest.mark.filterwarnings("ignore:.*non-empty model_from_pretrained_kwargs:UserWarning")


def apollo_sae(seed: int = 0, scale_decoder: bool = True, **settings: Any) -> ApolloTrainingSAE:
    """With decoder rows of every length, unless told otherwise, as they are once training is under way."""
    torch.manual_seed(seed)
    sae = ApolloTrainingSAE(
        ApolloTrainingSAEConfig(**({"d_in": D_IN, "d_sae": D_SAE, "sparsity_coefficient": LAMBDA} | settings))
    )
    if scale_decoder:
        sae.W_dec.data *= torch.linspace(0.2, 3, sae.cfg.d_sae)[:, None]
    return sae


def inputs(n: int = 50) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1))


def forward(sae: ApolloTrainingSAE, x: torch.Tensor, coefficient: float = LAMBDA) -> TrainStepOutput:
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients={"sparsity": coefficient},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
    )


def apollo_forward(sae: ApolloTrainingSAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and reconstruction by torch.nn.Linear and a normalised decoder, as in e2e_sae 2.1.1."""
    features = F.relu(F.linear(x, sae.W_enc.T, sae.b_enc))
    return features, F.linear(features, F.normalize(sae.W_dec.T, dim=0), sae.b_dec)


def test_forward_pass_is_apollos() -> None:
    sae, x = apollo_sae(), inputs()
    features, x_hat = apollo_forward(sae, x)
    output = forward(sae, x)
    torch.testing.assert_close(output.feature_acts, features)
    torch.testing.assert_close(output.sae_out, x_hat)
    torch.testing.assert_close(sae(x), x_hat)
    torch.testing.assert_close(output.losses["mse_loss"], ((x_hat - x) ** 2).sum(-1).mean())
    torch.testing.assert_close(output.loss, output.losses["mse_loss"] + output.losses["sparsity_loss"])
    assert 0 < float((features > 0).float().mean()) < 1


def test_decoder_length_does_not_matter_and_its_gradient_is_orthogonal_to_it() -> None:
    long, short = apollo_sae(), apollo_sae(scale_decoder=False)
    torch.testing.assert_close(forward(long, inputs()).loss, forward(short, inputs()).loss)
    forward(long, inputs()).loss.backward()
    assert long.W_dec.grad is not None
    assert long.W_dec.grad.norm() > 0.01
    torch.testing.assert_close((long.W_dec.grad * long.W_dec).sum(-1), torch.zeros(D_SAE), rtol=0, atol=1e-4)


def test_decoder_bias_is_not_subtracted_from_the_input() -> None:
    sae, x = apollo_sae(), inputs()
    features, x_hat = sae.encode(x), sae(x)
    sae.b_dec.data += 2
    assert torch.equal(sae.encode(x), features)
    torch.testing.assert_close(sae(x), x_hat + 2)


@pytest.mark.parametrize(("d_in", "d_sae"), [(16, 40), (16, 16), (16, 8)])
def test_decoder_starts_orthogonal(d_in: int, d_sae: int) -> None:
    W_dec = apollo_sae(scale_decoder=False, d_in=d_in, d_sae=d_sae).W_dec.detach()
    assert W_dec.shape == (d_sae, d_in)
    gram = W_dec.T @ W_dec if d_sae >= d_in else W_dec @ W_dec.T
    torch.testing.assert_close(gram, torch.eye(min(d_in, d_sae)), rtol=0, atol=1e-5)


def test_encoder_and_biases_start_as_those_of_torch_linear() -> None:
    sae = apollo_sae(scale_decoder=False)
    for parameter, fan_in in ((sae.W_enc, D_IN), (sae.b_enc, D_IN), (sae.b_dec, D_SAE)):
        assert 0.6 * fan_in**-0.5 < float(parameter.detach().abs().max()) <= fan_in**-0.5
    assert not torch.allclose(sae.W_enc, sae.W_dec.T, atol=0.1)
    assert torch.equal(apollo_sae().W_enc, sae.W_enc)
    assert not torch.equal(apollo_sae(seed=1).W_enc, sae.W_enc)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_sparsity_is_the_p_norm_over_d_in(p: float) -> None:
    sae, x = apollo_sae(lp_norm=p), inputs()
    x[0] = -100 * sae.W_enc.detach().sum(1)  # features of zero norm, or nearly none
    features, _ = apollo_forward(sae, x)
    expected = (features**p).sum(-1).pow(1 / p).mean() / D_IN
    output = forward(sae, x)
    assert output.losses.keys() == {"mse_loss", "sparsity_loss"}
    torch.testing.assert_close(output.losses["sparsity_loss"], LAMBDA * expected)
    torch.testing.assert_close(forward(sae, x, 0.7).losses["sparsity_loss"], 0.7 * expected)
    output.losses["sparsity_loss"].backward()
    assert sae.W_enc.grad is not None
    assert bool(sae.W_enc.grad.isfinite().all())
    assert float(sae.W_enc.grad.norm()) > 0
    assert sae.W_dec.grad is None


def test_coefficient_warms_up() -> None:
    sae = ApolloTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, sparsity_coefficient=LAMBDA, sparsity_warm_up_steps=3)
    trainer = make_trainer(make_runner(runner_config(sae=sae)))
    tokens = random_tokens(4, 12, 61)
    coefficients, losses = [], []
    for _ in range(5):
        coefficients.append(trainer.get_coefficients())
        losses.append(float(trainer.step(tokens).losses["sparsity_loss"]))
    expected = [0.0, LAMBDA / 3, 2 * LAMBDA / 3, LAMBDA, LAMBDA]
    assert [c["sparsity"] for c in coefficients] == pytest.approx(expected)
    assert losses[0] == 0
    assert losses[3] > 2 * losses[1] > 0


def test_is_saved_as_a_standard_sae_with_unit_rows(tmp_path: Path) -> None:
    sae, x = apollo_sae(), inputs()
    sae.save_inference_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "standard"
    assert config["apply_b_dec_to_input"] is False
    assert config["metadata"]["training_architecture"] == "apollo"
    saved = SAE.load_from_disk(tmp_path)
    assert isinstance(saved, StandardSAE)
    torch.testing.assert_close(saved.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(saved.encode(x), sae.encode(x), rtol=0, atol=0)
    torch.testing.assert_close(saved(x), sae(x))
    assert float(sae.W_dec.norm(dim=1).max()) > 1.1, "saving leaves the SAE in training as it is"


def test_a_trained_one_is_saved_with_the_same_outputs(tmp_path: Path) -> None:
    cfg = runner_config(
        sae=ApolloTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, sparsity_coefficient=LAMBDA), output_path=str(tmp_path)
    )
    trained = make_runner(cfg).run()
    assert trained.cfg.architecture() == "apollo"
    saved = SAE.load_from_disk(tmp_path)
    torch.testing.assert_close(saved(inputs()), trained(inputs()))
    assert saved.cfg.architecture() == "standard"


def test_layer_norm_runs_and_is_saved(tmp_path: Path) -> None:
    sae, x = apollo_sae(normalize_activations="layer_norm"), inputs()
    sae.save_inference_model(tmp_path)
    torch.testing.assert_close(SAE.load_from_disk(tmp_path)(x), sae(x))
    assert not torch.allclose(sae(x), apollo_sae()(x), atol=0.1)


def test_folding_the_decoder_norm_changes_no_output() -> None:
    sae, x = apollo_sae(), inputs()
    features, x_hat = sae.encode(x), sae(x)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(sae.encode(x), features, rtol=0, atol=0)
    torch.testing.assert_close(sae(x), x_hat)


def test_a_checkpoint_holds_the_raw_decoder(tmp_path: Path) -> None:
    sae = apollo_sae(lp_norm=0.7, sparsity_warm_up_steps=5)
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert isinstance(loaded, ApolloTrainingSAE)
    assert loaded.cfg.to_dict() == sae.cfg.to_dict()
    assert loaded.state_dict().keys() == sae.state_dict().keys() == {"W_enc", "W_dec", "b_enc", "b_dec"}
    for name, value in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    torch.testing.assert_close(forward(loaded, inputs()).loss, forward(sae, inputs()).loss)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input=True.*'standard'"),
        ({"decoder_init_norm": 0.1}, r"decoder_init_norm=0\.1.*None"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations='expected_average_only_in'"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations='covariance_whitening'"),
        ({"normalize_activations": "constant_norm_rescale"}, "normalize_activations='constant_norm_rescale'"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ApolloTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, **settings)


def test_a_negative_sparsity_coefficient_is_refused_by_the_runner() -> None:
    with pytest.raises(ValueError, match=r"sparsity_coefficient=-0\.1"):
        runner_config(sae=ApolloTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, sparsity_coefficient=-0.1))
