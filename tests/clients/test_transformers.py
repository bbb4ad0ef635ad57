"""transformers: its Trainer with default settings, generate(), gradient checkpointing."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import fasthyper

R, VOCABULARY = 8, 50


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


class Sentences(Dataset):
    """Dicts as a tokenizer makes them, with a cond for each sentence and a column that no model takes."""

    def __init__(self, labels):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, VOCABULARY, (32, 6), generator=generator)
        self.cond = torch.randn(32, 3, generator=generator)
        self.labels = labels(self.ids, self.cond)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {
            "input_ids": self.ids[i],
            "attention_mask": torch.ones(6, dtype=torch.long),
            "cond": self.cond[i],
            "labels": self.labels[i],
            "idx": torch.tensor(i),
        }


def hypernetwork(primary):
    trunk = nn.Sequential(nn.Linear(3, R), nn.Tanh())
    return fasthyper.Hypernetwork(trunk, fasthyper.hyperize(primary, cond_features=R))


@pytest.fixture
def classifier(transformers):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return hypernetwork(transformers.BertForSequenceClassification(config))


@pytest.fixture
def generator(transformers):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return hypernetwork(transformers.LlamaForCausalLM(config)).eval()


def test_trainer_with_default_settings(transformers, classifier, tmp_path):
    """It drops what is no argument of the model, here `idx`, and must find the labels."""
    data = Sentences(lambda ids, cond: (cond[:, 0] > 0).long())
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=30, learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True
    )
    trainer = transformers.Trainer(classifier, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    predicted = trainer.predict(data)
    assert predicted.label_ids.tolist() == data.labels.tolist()
    assert (predicted.predictions.argmax(1) == predicted.label_ids).mean() > 0.8


def test_trainer_saves_and_resumes(transformers, classifier, tmp_path):
    data = Sentences(lambda ids, cond: (cond[:, 0] > 0).long())
    arguments = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_steps": 4}
    first = transformers.TrainingArguments(str(tmp_path), num_train_epochs=1, **arguments)
    transformers.Trainer(classifier, first, train_dataset=data).train()
    longer = transformers.TrainingArguments(str(tmp_path), num_train_epochs=2, **arguments)
    resumed = transformers.Trainer(classifier, longer, train_dataset=data)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(classifier, reentrant):
    data = Sentences(lambda ids, cond: (cond[:, 0] > 0).long())
    batch = {"input_ids": data.ids, "cond": data.cond, "labels": data.labels}
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            classifier.primary.gradient_checkpointing_enable({"use_reentrant": reentrant})
        classifier.train().zero_grad()
        classifier(**batch).loss.backward()
        found.append({name: p.grad for name, p in classifier.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0])
    assert found[0].keys() >= {"trunk.0.weight"}


def test_trainer_with_gradient_checkpointing(transformers, classifier, tmp_path):
    data = Sentences(lambda ids, cond: (cond[:, 0] > 0).long())
    classifier.primary.gradient_checkpointing_enable()
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=15, learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True
    )
    trainer = transformers.Trainer(classifier, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before


def test_generate(generator):
    """Each sentence continues as its own instance says, as if it were alone."""
    ids, cond = torch.randint(1, VOCABULARY, (4, 5)), 3 * torch.randn(4, 3)
    for p in generator.parameters():
        nn.init.normal_(p, std=0.3)
    settings = {"max_new_tokens": 6, "do_sample": False}
    with generator.deliver(cond) as primary:
        together = primary.generate(ids, **settings)
    for i in range(4):
        with generator.deliver(cond[i : i + 1]) as primary:
            assert torch.equal(primary.generate(ids[i : i + 1], **settings)[0], together[i])
    assert len({tuple(row) for row in together[:, 5:].tolist()}) > 1
    assert together.shape == (4, 11)


def test_beams(generator):
    """Beams are folded into the batch: repeat_z."""
    ids, cond = torch.randint(1, VOCABULARY, (3, 5)), torch.randn(3, 3)
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    generator.repeat_z = True
    with generator.deliver(cond) as primary:
        together = primary.generate(ids, **settings)
    for i in range(3):
        with generator.deliver(cond[i : i + 1]) as primary:
            assert torch.equal(primary.generate(ids[i : i + 1], **settings)[0], together[i])
