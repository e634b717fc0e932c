from tabom import PromptSet, SamplerConfig
from tabom.evaluation.responses import accuracy, complete


def test_accuracy_by_the_check_of_the_prompt_set(model):
    config = SamplerConfig(max_new_tokens=3)
    prompts = PromptSet("digits", ["12+34=", "9="], ["", ""], check=lambda prompt, answer, response: prompt == "9=")
    assert len(complete(model, prompts, config)) == 2
    assert accuracy(model, prompts, config).tolist() == [0, 1]
