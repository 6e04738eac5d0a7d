"""What the benchmarks ask actors and judges, in our own words; filled with `data.prompts.fill`."""

# ---- multiple choice: `profile` is left out where none is given --------------------------------------------

CROSS_MR = {
    "system": "You know the characters of novels well and say why they act as they do. The character is "
    "{character}, from {book}.",
    "profile": "\n\nWhat is known about {character}:\n{profile}",
    "question": "What happens:\n{scenario}\n\n{question}",
    "alone": "Say in one sentence why {character} acts as they do.",
}

LIFE_CHOICE = {
    "system": "You are {character}, a character of a novel, and decide as {character} would.",
    "profile": "\n\nThis is {character}:\n{profile}",
    "question": "The situation:\n{scenario}\n\n{question}",
    "alone": "Say in one sentence what you, {character}, decide to do.",
}

# generation: reasons first, then the choice (CoSER paper, section 5.1)
CHOOSE = (
    "{question}\n\n{options}\n\nExactly one of these is right. First weigh them in a few sentences, by what "
    "{character} wants, fears and has lived through. Then end with a line of this form, with one of the "
    "letters {letters} in place of X:\nAnswer: X"
)

# likelihood: each option is scored as the answer
ANSWER = "{question}\n\nAnswer in one sentence."

# ---- InCharacter: the interview, by language ---------------------------------------------------------------

INTERVIEW = {
    "en": "You are {character}. Stay {character} throughout, in knowledge, opinions and manner of speech.\n\n"
    "This is {character}:\n{profile}\n\n"
    "You have come to somebody who studies personalities and can tell what kind of person you are, if you "
    "are open about yourself. They speak to you through {experimenter}. Answer each question truthfully and "
    "at some length: say what you think of yourself there, and give the reasons and the moments of your life "
    "that show it.",
    "zh": "你是{character}。请始终以{character}的身份回答，所知、所想和说话方式都与{character}一致。\n\n"
    "关于{character}：\n{profile}\n\n"
    "你来见一位研究性格的人，只要你坦诚相告，就能看出你是怎样的人；问题由{experimenter}替他提出。"
    "请如实而详细地回答每个问题：说出你怎么看自己，并讲明理由和能说明这一点的经历。",
}
NO_ANSWER = "(no answer)"

# ---- InCharacter: the rating, in which the character is anonymous ------------------------------------------

PARTICIPANT, EXPERIMENTER = "<the participant>", "<the experimenter>"

DIMENSIONS = {  # in the order of the tables
    "Extraversion": "how much somebody is drawn to people and activity. High: talkative, sociable, "
    "assertive, lively, in search of excitement, openly cheerful. Low: quiet, reserved, at ease alone, slow "
    "to step forward.",
    "Neuroticism": "how easily somebody is upset. High: anxious, tense, moody, quick to anger or sadness, "
    "unsure, shaken by stress. Low: calm, even-tempered, secure, steady under pressure.",
    "Conscientiousness": "how much somebody plans and controls what they do. High: orderly, reliable, "
    "diligent, persistent, careful. Low: careless, impulsive, easily distracted, untidy, lazy.",
    "Agreeableness": "how somebody treats others. High: trusting, helpful, forgiving, modest, kind, "
    "cooperative. Low: suspicious, quarrelsome, cold, arrogant, rude, out for themselves.",
    "Openness": "how much somebody seeks new ideas and experience. High: curious, imaginative, inventive, "
    "fond of art and thought, ready to question custom. Low: down-to-earth, conventional, fond of routine, "
    "uninterested in art or theory.",
}

RATE = (
    "You assess personalities. Below, {experimenter} questions {participant}. Judge one dimension of the Big "
    "Five alone:\n\n{dimension}: {description}\n\n{interview}\n\nHow high does {participant} stand on "
    "{dimension}, by what these answers say and show? Give a number from 1 (very low) to 5 (very high), in "
    "steps of 0.5; 3 is the middle. Weigh conduct and manner as well as what is claimed. Reply with JSON "
    'alone, the reasons first: {"analysis": "...", "result": number}'
)

CONVERT = (
    "You assess personalities. Below, {experimenter} questions {participant}; before each question stand its "
    "number and the statement it is about.\n\n{interview}\n\nFor each number, how far would {participant} "
    'agree that the statement is true of them? "1": not at all, "2": rather not, "3": neither, "4": rather, '
    '"5": fully, "x": the answer refuses the question. Reply with JSON alone: an object with one of these '
    "values for each number, such as {example}"
)
