"""Captions of common things, against which a search judges whether a query has anything to do with an index.

Half of the nouns for things one can see that WordNet's tagged texts use at least twice in that sense, and of the names of
ImageNet's classes. `python -m benchmarks.relevance background` wrote them; the other half measures how well they serve.
"""

from __future__ import annotations

_THINGS = """
body; tree; horse; plant; gun; road; earth; street; product; window; letter; film; floor; hair; object; building;
dictionary; bank; ball; coffee; newspaper; kitchen; grass; flower; hotel; block; machine; box; camp; bullet; flag;
roof; hill; tube; feed; store; weapon; bottle; chicken; train; wagon; cup; holder; sketch; station; barn; bedroom;
skin; article; cow; milk; pool; egg; leaf; rock; truck; creature; dress; pansy; telephone; total; whisky; anaconda;
basement; bench; cat; factory; liquor; shore; uniform; collage; load; photograph; seed; sweet clover; tent; watch;
wheel; antenna; bunk; magazine; suit; aircraft; automobile; island; nest; sheep; stairs; vehicle; boat; button; fruit;
horn; mouse; saddle; supper; universe; bumblebee; bell; breakfast; canteen; canvas; ceiling; dish; electron; highway;
human; knife; lunch; round; sculpture; steeple; tape; transportation; watercolor; ammunition; arms; disc; envelope;
hay; micelle; micrometeorite; publication; suitcase; theatre; wine; front door; headquarters; piano; thermometer;
vocabulary; bomb; bush; clothing; deck; fly; gadget; lock; mirror; musket; pen; rice; sword; bow; cathode; chamber;
chapel; commuter; department store; machine gun; radish; ration; shelf; temple; tire; cartridge; catkin; concentration
camp; continent; dressing room; freeway; kitten; landing; map; match; microscope; motif; mound; paint; pencil; pig;
pill; reflector; restaurant; skiff; textile; works; algae; antelope; art school; bandage; bark; bathroom; bough; cart;
closet; computer; counter; diagram; drum; goat; larva; lemon; lobby; mat; net; nightclub; quarters; ribbon; rotor;
sandwich; shipment; sonar; stove; tea; thermocouple; whiskey; additive; airplane; architecture; barge; bayonet; beast;
biscuit; boxcar; bud; cafe; cane; classroom; colors; compass; couch; curb; divan; dive; documentary; draw; drawer;
edition; elevator; embankment; feedlot; filter; greatcoat; hallway; invitation; ladder; lamb; lens; megaton bomb;
monocle; mount; pan; pebble; portal; rack; red blood cell; rein; rope; rose; sewage system; sewer; slipper; sofa;
stocking; sugar; switch; taxi; tower; transport; trough; worm; airport; aisle; amethystine python; anchor; banner;
barbed wire; burrow; cab; candle; carriage; cathedral; cold frame; comb; commodity; contraceptive; cross; dairy cow;
decoration; dough; duck; easel; flask; fox; freak; front room; garment; glasses; hammer; haversack; innovation;
instrumentation; mailbox; meat; muzzle; outlet; pavement; periodical; pickup; ramrod; robe; segment; sheath; slacks;
slug; sod; speck; tenement; thread; toy; tubing; vending machine; weapon system; xylem; accelerator; album; ambulance;
ammo; apple tree; apron; arroyo; barricade; bas relief; baton; brandy; bread; break seal; briefcase; burr; carpet;
classic; cliff; crutch; double bass; dressing gown; drone; enclosure; eyebrow; farmhouse; fish hawk; fishing boat;
flap; flour; foyer; goose; guitar; harness; hearth; hillside; idol; inn; jail; jam; jet; knob; linen; loaf; mainland;
mast; moth; overcoat; pane; passageway; pea; piano stool; place of business; plaque; plaster; police car; poncho;
potato yellow-dwarf virus; premix; pyrometer; railing; ranch house; reel; repertory; repository; saddlebag; sandal;
school system; schoolhouse; schoolroom; sherry; skylight; snail; squirrel; staircase; stool; swimming pool; tack
hammer; telephone line; tractor; trouser; turbine; ultracentrifuge; undershirt; vent; verbena; ways; weed; whip;
wildlife; accessory; adobe house; anion; armadillo; attic; attire; backstage; barley; basin; bathing suit; bathtub;
battle flag; beef cattle; beer bottle; best seller; beverage; bin; bludgeon; bookcase; brothel; buckboard; bucket;
buggy; butt; cake; capacitor; carbine; catheter; centrifuge; chick; coffee shop; compress; conference house; coop;
corral; coupling; courtyard; crusher; dam; deer; dessert; ditch; dormitory; dove; duplication; edifice; electric
razor; electric toothbrush; electrocardiograph; escritoire; facing; falcon; fountain; fox terrier; frieze; front
porch; funeral parlor; gambling house; garrison; garter snake; gas chamber; gelding; gingham; ginmill; grill; gum;
hamper; hatchway; hedge; herb; hillock; hollyhock; hoop; house of prostitution; implement; intrenchment; jar; juice;
keyhole; kitchen sink; kitchenette; leash; light bulb; lion; lobscuse; local; local call; locker room; lodging;
lodgings; loft; louse; maggot; main street; masonry; meat house; melon; miniature; mosaic; mosquito; mountainside;
muscle fiber; musical theater; mutton; noisemaker; nozzle; nude; nursery; outside door; pamphlet; panther; parachute;
peg; pheasant; possum; potato; projectile; pulpit; puppy; raft; railroad siding; rattler; recorder; rectifier;
reinforced concrete; relic; rhino; riverbank; rod; sable; sail; salon; sardine; scaffold; scarf; seam; sedan;
seismograph; shotgun; shovel; shower room; shrapnel; sloe; small-arm; snowball; soup; spoke; spore; sputnik; stage
door; stethoscope; stone wall; storefront; strap; straw hat; streetlight; stucco; submachine gun; sunshade;
sustenance; sweatshirt; swivel chair; synagogue; taffy; telephone booth; telephone call; television set; terrace;
terrier; thoroughfare; time machine; tine; transit; tree trunk; trench; truck bed; turban; unleavened bread; utensil;
veil; velvet; vestibule; walk-up; wallet; weave; weekly; windowpane; woodpecker; wreath; zoo; goldfish; great white
shark; tiger shark; hammerhead; electric ray; cock; ostrich; house finch; junco; bulbul; magpie; water ouzel; european
fire salamander; common newt; eft; axolotl; mud turtle; box turtle; banded gecko; common iguana; american chameleon;
agama; frilled lizard; green lizard; african chameleon; african crocodile; american alligator; ringneck snake; hognose
snake; water snake; green mamba; horned viper; sidewinder; harvestman; black and gold garden spider; ptarmigan; ruffed
grouse; prairie chicken; lorikeet; coucal; toucan; black swan; tusker; echidna; platypus; wallaby; wombat; brain
coral; conch; sea slug; chambered nautilus; dungeness crab; rock crab; fiddler crab; king crab; american lobster;
spiny lobster; hermit crab; isopod; black stork; flamingo; little blue heron; crane; european gallinule; bustard;
ruddy turnstone; redshank; dowitcher; king penguin; killer whale; sea lion; maltese dog; pekinese; shih-tzu; blenheim
spaniel; papillon; afghan hound; basset; beagle; whippet; ibizan hound; otterhound; american staffordshire terrier;
border terrier; irish terrier; yorkshire terrier; wire-haired fox terrier; miniature schnauzer; giant schnauzer;
standard schnauzer; labrador retriever; chesapeake bay retriever; german short-haired pointer; irish setter; brittany
spaniel; clumber; welsh springer spaniel; irish water spaniel; schipperke; groenendael; malinois; briard; kelpie;
shetland sheepdog; collie; border collie; greater swiss mountain dog; bernese mountain dog; entlebucher; boxer; bull
mastiff; french bulldog; saint bernard; dalmatian; affenpinscher; basenji; leonberg; newfoundland; great pyrenees;
samoyed; brabancon griffon; miniature poodle; standard poodle; red wolf; dingo; hyena; red fox; arctic fox; grey fox;
tabby; persian cat; siamese cat; egyptian cat; lynx; snow leopard; jaguar; tiger; cheetah; brown bear; ice bear;
mongoose; tiger beetle; ladybug; leaf beetle; cockroach; mantis; cicada; leafhopper; lacewing; dragonfly; damselfly;
monarch; cabbage butterfly; sulphur butterfly; lycaenid; sea urchin; hamster; fox squirrel; marmot; hog; wild boar;
warthog; hippopotamus; water buffalo; ram; bighorn; ibex; hartebeest; gazelle; mink; skunk; badger; three-toed sloth;
patas; baboon; langur; proboscis monkey; howler monkey; spider monkey; squirrel monkey; madagascar cat; indri; indian
elephant; african elephant; lesser panda; barracouta; eel; rock beauty; sturgeon; gar; abacus; academic gown;
accordion; acoustic guitar; altar; amphibian; analog clock; apiary; ashcan; backpack; bakery; balance beam; ballpoint;
banjo; bannister; barber chair; basketball; bassoon; bathing cap; bath towel; bearskin; beer glass; binoculars;
boathouse; bobsled; bullet train; butcher shop; canoe; can opener; carousel; carpenter's kit; car wheel; cash machine;
cd player; cello; chain; chain mail; chiffonier; church; cinema; cleaver; coil; combination lock; container ship;
cornet; crock pot; croquet ball; cuirass; desktop computer; diaper; disk brake; dogsled; doormat; drilling platform;
dutch oven; electric fan; electric guitar; electric locomotive; entertainment center; espresso maker; file; folding
chair; four-poster; french horn; frying pan; fur coat; garbage truck; gasmask; gong; grand piano; hand-held computer;
hard disc; harp; hatchet; home theater; hoopskirt; horizontal bar; horse cart; jack-o'-lantern; jersey; jigsaw puzzle;
jinrikisha; joystick; ladle; laptop; lens cap; letter opener; library; liner; loafer; loudspeaker; loupe; magnetic
compass; medicine chest; microwave; minibus; miniskirt; mitten; mixing bowl; model t; modem; monastery; monitor;
mortarboard; mosquito net; mountain bike; mountain tent; moving van; nail; neck brace; obelisk; oboe; odometer; oil
filter; organ; overskirt; packet; paddle; padlock; paintbrush; paper towel; parallel bars; parking meter; patio; pay-
phone; petri dish; pick; pickelhaube; pier; piggy bank; pinwheel; pirate; pitcher; planetarium; plate rack; plunger;
police van; pool table; pop bottle; pot; potter's wheel; power drill; printer; projector; racer; rain barrel;
recreational vehicle; reflex camera; rocking chair; rule; safety pin; scabbard; school bus; scoreboard; screen; screw;
screwdriver; sewing machine; shoe shop; shower cap; ski; slide rule; sliding door; slot; snowmobile; snowplow; soap
dispenser; solar dish; sombrero; space bar; space shuttle; speedboat; spindle; stage; steel drum; stole; strainer;
stretcher; studio couch; sunglass; swimming trunks; swing; thatch; theater curtain; thimble; throne; tile roof; totem
pole; toyshop; tricycle; trimaran; tripod; triumphal arch; trolleybus; vacuum; vault; vestment; washer; water tower;
whistle; wig; window screen; windsor tie; wine bottle; wooden spoon; wreck; yawl; yurt; web site; crossword puzzle;
traffic light; book jacket; plate; hot pot; french loaf; bagel; pretzel; mashed potato; head cabbage; broccoli;
spaghetti squash; butternut squash; cardoon; mushroom; fig; jackfruit; pizza; potpie; burrito; red wine; eggnog; alp;
bubble; coral reef; promontory; ballplayer; scuba diver; acorn; hip; buckeye; coral fungus; agaric; gyromitra;
stinkhorn
"""


def captions(model: str = "") -> list[str]:
    """The background for a model, by its id. `tiny` knows rendered scenes and nothing else, so it gets scenes."""
    if model.startswith("tiny-"):
        from ecliptic.data.scenes.world import COLOURS, SHAPES, TEXTURES

        things = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
        return [f"a {thing}" for thing in things] + [f"a {texture} {thing}" for thing in things for texture in TEXTURES]
    return [word.strip() for word in " ".join(_THINGS.split()).split(";")]
