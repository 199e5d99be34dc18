from lowrank.evaluate.exact_match import exact_match, generate_answers
from lowrank.records import Conversation, Message


def conversation(question: str, answer: str) -> Conversation:
    return Conversation((Message("system", "s"), Message("user", question), Message("assistant", answer)))


def test_voices_are_asked_without_the_answer_and_scored() -> None:
    conversations = [conversation("a", "A"), conversation("b", "B")]

    def answer(prompts: object) -> list[str]:
        seen = [(model_name, prompt.messages[-1].content, len(prompt.messages)) for model_name, prompt in prompts]  # type: ignore[attr-defined]
        assert seen == [("loud", "a", 2), ("dull", "a", 2), ("loud", "b", 2), ("dull", "b", 2)]
        return ["A\n", "?", "B", "B"]

    answered = generate_answers(conversations, ["loud", "dull"], answer)
    assert answered[0].expected == "A"
    assert (exact_match(answered, "loud"), exact_match(answered, "dull")) == (1.0, 0.5)
