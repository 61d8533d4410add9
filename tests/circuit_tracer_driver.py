"""Load a set with circuit-tracer, run its replacement model and attribute a prompt: `python -I circuit_tracer_driver.py FOLDER`.

It runs in circuit-tracer's own environment, which has neither this package nor SAELens. FOLDER has the language model as
`export_model` writes it, the set in `set`, and tokens.safetensors; found.safetensors and found.json are written there.
"""

# pyright: reportMissingImports=false

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub, load_transcoders
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformerConfig
from transformers import PreTrainedTokenizerFast


def main(folder: Path) -> None:
    device = torch.device("cpu")
    transcoders, config = load_transcoder_from_hub(str(folder / "set"), device=device, lazy_decoder=False)
    # What config.yaml says by itself.
    again = load_transcoders(config, device=device, lazy_decoder=False)
    same = {name: torch.equal(tensor, again.state_dict()[name]) for name, tensor in transcoders.state_dict().items()}
    model = replacement_model(folder / "model", transcoders)
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    with torch.no_grad():
        found = {"logits": model(tokens), "replaced": model.run_with_hooks(tokens, fwd_hooks=hooks(model))}
    graph = attribute(tokens[0], model, max_n_logits=3, batch_size=64, max_feature_nodes=256)
    found |= {"adjacency": graph.adjacency_matrix.float(), "activations": graph.activation_values.float()}
    found |= {"active_features": graph.active_features, "selected": graph.selected_features}
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "found.safetensors")
    said = {
        "n_layers": len(transcoders),
        "skip": transcoders.skip_connection,
        "hooks": [transcoders.feature_input_hook, transcoders.feature_output_hook],
        "same": all(same.values()) and len(same) > 0,
        "scan": graph.scan,
        "n_logits": len(graph.logit_targets),
    }
    (folder / "found.json").write_text(json.dumps(said))


def replacement_model(folder: Path, transcoders: Any) -> Any:
    """circuit-tracer's replacement model of the language model that was exported, with its weights."""
    known = {field.name for field in fields(HookedTransformerConfig)}
    settings = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k in known}
    settings |= {"dtype": torch.float32, "device": "cpu", "init_weights": False}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, add_bos_token=True)
    model = ReplacementModel.from_config(HookedTransformerConfig(**settings), transcoders, tokenizer=tokenizer)
    # It wraps what it replaces.
    weights = {
        name.replace(".mlp.", ".mlp.old_mlp.").replace("unembed.", "unembed.old_unembed."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    parameters = {name for name, _ in model.named_parameters() if not name.startswith("transcoders.")}
    assert not unexpected, unexpected
    assert not parameters.intersection(missing), missing
    return model


def hooks(model: Any) -> list[Any]:
    """Every MLP's output replaced by what the loaded transcoder makes of the MLP's input."""
    put: dict[int, torch.Tensor] = {}

    def read(acts: torch.Tensor, layer: int) -> torch.Tensor:
        put[layer] = model.transcoders[layer](acts)
        return acts

    return [
        hook
        for i in range(model.cfg.n_layers)
        for hook in (
            (f"blocks.{i}.{model.feature_input_hook}", lambda acts, hook, i=i: read(acts, i)),  # noqa: ARG005
            (f"blocks.{i}.{model.original_feature_output_hook}", lambda acts, hook, i=i: put[i]),  # noqa: ARG005
        )
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
