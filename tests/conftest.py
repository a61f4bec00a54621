"""Small seeded models and tokenizers shared by every test, in the layouts real repositories have."""

import os
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Before torch is imported anywhere: one thread a process, since several test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' ~ message['role']) }}{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' }}{{ message['content'] | trim }}{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TINY_VOCAB_SIZE = 320
TRAINING_LINES = (
    "Hello, how may I help you today?",
    "I need a cheap restaurant in the centre of town, please.",
    "There are several cheap restaurants in the centre. Would you like Italian or Indian food?",
    "Italian food sounds good. Please book a table for two people at seven in the evening.",
    "Your table for two people is booked. Is there anything else I can help you with?",
    "No, thank you, that is everything. Goodbye!",
)


@pytest.fixture(scope="session")
def dialogue_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly `TINY_VOCAB_SIZE` entries with the demo model's special tokens and template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCAB_SIZE,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_LINES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    assert len(fast) == TINY_VOCAB_SIZE
    return fast


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, dialogue_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A saved random float32 Llama (2 layers, 4 query / 2 KV heads of 16, context 512) with `dialogue_tokenizer`.

    Weights are wider than usual, so that its greedy text varies instead of repeating one token.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TINY_VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            initializer_range=0.15,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=4,
            pad_token_id=0,
        )
    )
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, top_p=0.95, bos_token_id=0, eos_token_id=[4, 0], pad_token_id=0
    )
    path = tmp_path_factory.mktemp("tiny_model")
    model.save_pretrained(path)
    dialogue_tokenizer.save_pretrained(path)
    return path
