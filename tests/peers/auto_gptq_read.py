"""Read every GPTQ matrix of a file by auto-gptq's QuantLinear, and pack the values again.

    .peers/auto-gptq/bin/python -W ignore auto_gptq_read.py IN.safetensors OUT.safetensors BITS GROUP_SIZE

OUT holds, per matrix, NAME.weight (float32, from a forward of the identity) and what its pack() makes of it.
"""

# pyright: reportMissingImports=false

import sys

import torch
from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear
from safetensors.torch import load_file, save_file


def read(stored, name, bits, group_size):
    """Load a matrix into auto-gptq's layer and run it on the identity: [in, out] comes out."""
    qweight, scales = stored[name + ".qweight"], stored[name + ".scales"]
    inputs, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
    layer = QuantLinear(bits, group_size, inputs, outputs, bias=False, weight_dtype=torch.float32)
    state = {part: stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "g_idx")}
    missing, unexpected = layer.load_state_dict({**state, "scales": scales.float()}, strict=True)
    assert not missing
    assert not unexpected
    return layer, layer(torch.eye(inputs)).T.contiguous()


def pack_again(layer, weight, zeros):
    """The words that auto-gptq itself writes for these values, scales and zero points."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    fresh = QuantLinear(layer.bits, layer.group_size, *weight.shape[::-1], bias=False, weight_dtype=torch.float32)
    fresh.pack(linear, layer.scales.T.clone(), zeros, layer.g_idx)
    return fresh.qweight, fresh.qzeros


def unpack_zeros(layer):
    """Zero points [out, groups] by the definition: 32 / bits fields a word, lowest first, stored minus one."""
    fields = [(layer.qzeros >> shift) & (2**layer.bits - 1) for shift in range(0, 32, layer.bits)]
    stored = torch.stack(fields, -1).flatten(1)
    return ((stored + 1) & (2**layer.bits - 1)).T.float().contiguous()


def main(source, target, bits, group_size):
    stored, out = load_file(source), {}
    for name in sorted(key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")):
        layer, weight = read(stored, name, bits, group_size)
        out[name + ".weight"] = weight
        out[name + ".qweight"], out[name + ".qzeros"] = pack_again(layer, weight, unpack_zeros(layer))
    save_file(out, target)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
