"""Words for RULER's tasks: plain English ones, and made-up ones where a prompt needs more than there are.

RULER draws from the lists of the wonderwords package, about 8,000 words. These lists are our own and shorter, so a
long list of words (`cwe` above some 10,000 tokens) is of made-up words alone, as RULER changes to another list
where wonderwords is too short.
"""

import itertools
import random
import uuid

from longred_megatron.evaluation.retrieval_text import WORDS as NOUNS

_ADJECTIVES = """
able absent active ancient angry aware awful bald basic bitter blank blind bold brave brief bright broad broken
busy calm careful cheap clean clear clever cloudy cold common cool corny crisp crooked cruel curious damp daring
dark deaf dear deep dense dim direct dirty distant double dry dull dusty eager early easy elder elegant empty
equal exact extra faint fair faithful false famous fancy fast fatal fierce final firm fixed flat fluffy foreign
formal fragile frank free fresh friendly frozen full funny gentle giant glad global grand grateful gray greasy
great green grim handy happy hard harsh hasty heavy hidden hollow holy honest huge humble hungry icy idle
innocent jolly joyful keen kind known lame large late lazy lean level light little lively local lonely long loose
loud lovely low loyal lucky mad major mature mean mild minor misty modern modest muddy narrow native neat new
nice noble noisy normal odd old open ordinary outer pale past patient perfect plain pleasant polite poor popular
private proper proud pure quick quiet random rapid rare raw ready real red regular rich rigid ripe rough round
royal rude rusty sad safe salty sandy scarce secret senior serious severe shallow sharp shiny short shy silent
silly simple single sleepy slim slow small smart smooth soft solid sore sour spare special steady steep sticky
stiff strange strict strong stupid sudden sunny super sweet swift tall tame tender thick thin tidy tiny tired
tough toxic tricky true ugly unique upset urgent useful usual vague valid vast vital vivid warm wary weak wealthy
weird wet white whole wicked wide wild windy wise witty wooden young
"""
_VERBS = """
accept add admire admit advise agree allow announce answer appear argue arrange arrest arrive ask attach attack
avoid bake balance beg behave belong bend bless blink boil borrow bounce bow breathe build burn bury buy call
carry carve catch cause challenge change charge chase chat check cheer chew choose claim clap climb close collect
compare complain confess confuse connect consider contain continue copy correct cough count cover crash crawl
cross cry curl cut damage deal decay decide decorate delay deliver depend describe deserve destroy develop dig
disagree discover divide drag draw drink drive drop earn eat employ encourage end enjoy enter escape examine
excite excuse exist expand expect explain explode extend fail fall fasten fear feed feel fetch fill find fit float
flow fold follow forbid forget forgive freeze gather gaze give glow grab greet grin grip grow guess guide handle
hang happen hate heal hear heat help hide hit hope hover hug hunt hurry identify ignore imagine improve include
increase inform inject injure invent invite itch join judge juggle jump keep kick kneel knit knock know laugh
launch lead learn leave lend lick lie lift listen live lock look lose love manage mark marry matter meet melt
memorize mend mix move multiply murder nail need nod notice obey object observe obtain offer order owe pack paint
park pass paste pause peel peep perform permit phone pinch please plug point poke polish possess pour practice
pray preach precede prefer prepare present press pretend prevent produce promise protect provide pull pump punch
push question race raise reach read realize receive recognize record reduce reflect refuse regret reject relax
release rely remain remember remind remove repair repeat replace reply report rescue retire return rinse risk rob
rock roll rub ruin rule run rush sail save scare scatter scold scratch scream screw search seem sell send separate
serve sew shake share shave shelter shiver shock shop show shrug sigh sign sing sink sit skip slap sleep slide
slip smash smell smile smoke sneeze sniff soak sound spell spend spill spin spoil spread squash squeak stain stamp
stand stare start stay steal stir stitch stop store stretch strip stuff subtract succeed suffer suggest supply
support suppose surprise surround suspect switch take talk tap taste teach tease tell tempt terrify test thank
think throw tie tip touch tour trace trade train travel treat tremble trip trot trust try tug tumble turn twist
type undress unite unlock unpack use vanish visit wait wake walk wander want warn wash waste watch wave weigh
welcome whip whirl whisper whistle win wink wipe wish wonder work worry wrap wreck wrestle write yawn yell
"""
ADJECTIVES, VERBS = tuple(_ADJECTIVES.split()), tuple(_VERBS.split())
ENGLISH = tuple(sorted({*NOUNS, *ADJECTIVES, *VERBS}))
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SYLLABLES = tuple(map("".join, itertools.product(_CONSONANTS, _VOWELS)))
MADE_UP_SYLLABLES = 3
NUM_MADE_UP = len(_SYLLABLES) ** MADE_UP_SYLLABLES  # 343,000


def draw_words(num_words: int, rng: random.Random) -> list[str]:
    """`num_words` different words: English ones as far as one draw of them reaches, otherwise made-up ones only.

    Raises `ValueError` above `NUM_MADE_UP`.
    """
    if num_words <= len(ENGLISH):
        return rng.sample(ENGLISH, num_words)
    return [_made_up(index) for index in rng.sample(range(NUM_MADE_UP), num_words)]


def _made_up(index: int) -> str:
    """The word of three syllables with this number: "bababa" is 0."""
    syllables = []
    for _ in range(MADE_UP_SYLLABLES):
        index, syllable = divmod(index, len(_SYLLABLES))
        syllables.append(_SYLLABLES[syllable])
    return "".join(reversed(syllables))


def draw_adjective_noun(rng: random.Random) -> str:
    """A key such as "quiet-harbor"."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def draw_number(rng: random.Random) -> str:
    """Seven digits, the first not 0."""
    return str(rng.randint(1_000_000, 9_999_999))


def draw_uuid(rng: random.Random) -> str:
    """A random UUID (version 4), 36 characters."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
