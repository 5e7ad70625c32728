"""A stand-in for llama.cpp's convert_hf_to_gguf.py: the tokenizer's facts and one tensor, with the same options.

The environment variable SPOIL makes it fail ("exit"), or write another chat template ("template") or end token ("end").
"""

import argparse
import os
import sys

import numpy as np
from gguf import GGUFWriter
from transformers import AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--outtype", choices=("f32", "bf16", "f16"))
parser.add_argument("--outfile")
arguments = parser.parse_args()
spoil = os.environ.get("SPOIL")
if spoil == "exit":
    sys.exit("Model Tiny is not supported")
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
writer = GGUFWriter(arguments.outfile, "llama")
writer.add_chat_template(tokenizer.chat_template + "!" * (spoil == "template"))
writer.add_eos_token_id(tokenizer.eos_token_id + 1000 * (spoil == "end"))
writer.add_add_bos_token(True)
writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
