"""The closed vocabulary of the translation corpus: nouns, adjectives, calendar words, frames and set phrases.

Data only. Each noun gives singular, plural and gender in French, German and Spanish; each adjective gives the forms
that agreement needs. How they are put together is `translation_grammar`'s business.
"""

from __future__ import annotations

from typing import NamedTuple


class Noun(NamedTuple):
    """A countable noun. `kind`: o object, f food or drink, a animal, p person, l place."""

    kind: str
    en: tuple[str, str]
    fr: tuple[str, str, str]
    de: tuple[str, str, str]
    es: tuple[str, str, str]


class Adjective(NamedTuple):
    """An adjective; `fr` is (masculine, feminine, masculine plural, feminine plural, masculine before a vowel)."""

    en: str
    kinds: str
    fr_before_noun: bool
    fr: tuple[str, str, str, str, str]
    de: tuple[str, str]
    es: tuple[str, str, str, str]


def _noun(row: str) -> Noun:
    kind, en, en_pl, fr, fr_pl, fr_g, de, de_pl, de_g, es, es_pl, es_g = row.split()
    return Noun(kind, (en, en_pl), (fr, fr_pl, fr_g), (de, de_pl, de_g), (es, es_pl, es_g))


_NOUN_ROWS = """
o house houses maison maisons f Haus Häuser n casa casas f
o car cars voiture voitures f Auto Autos n coche coches m
o book books livre livres m Buch Bücher n libro libros m
o table tables table tables f Tisch Tische m mesa mesas f
o chair chairs chaise chaises f Stuhl Stühle m silla sillas f
o door doors porte portes f Tür Türen f puerta puertas f
o window windows fenêtre fenêtres f Fenster Fenster n ventana ventanas f
o letter letters lettre lettres f Brief Briefe m carta cartas f
o key keys clé clés f Schlüssel Schlüssel m llave llaves f
o lamp lamps lampe lampes f Lampe Lampen f lámpara lámparas f
o bed beds lit lits m Bett Betten n cama camas f
o boat boats bateau bateaux m Boot Boote n barco barcos m
o train trains train trains m Zug Züge m tren trenes m
o flower flowers fleur fleurs f Blume Blumen f flor flores f
o tree trees arbre arbres m Baum Bäume m árbol árboles m
o garden gardens jardin jardins m Garten Gärten m jardín jardines m
o bag bags sac sacs m Tasche Taschen f bolso bolsos m
o hat hats chapeau chapeaux m Hut Hüte m sombrero sombreros m
o shirt shirts chemise chemises f Hemd Hemden n camisa camisas f
o shoe shoes chaussure chaussures f Schuh Schuhe m zapato zapatos m
o bicycle bicycles vélo vélos m Fahrrad Fahrräder n bicicleta bicicletas f
o picture pictures image images f Bild Bilder n imagen imágenes f
o ticket tickets billet billets m Fahrkarte Fahrkarten f billete billetes m
o room rooms chambre chambres f Zimmer Zimmer n habitación habitaciones f
o newspaper newspapers journal journaux m Zeitung Zeitungen f periódico periódicos m
o clock clocks horloge horloges f Uhr Uhren f reloj relojes m
o knife knives couteau couteaux m Messer Messer n cuchillo cuchillos m
o bottle bottles bouteille bouteilles f Flasche Flaschen f botella botellas f
f coffee coffees café cafés m Kaffee Kaffees m café cafés m
f tea teas thé thés m Tee Tees m té tés m
f beer beers bière bières f Bier Biere n cerveza cervezas f
f apple apples pomme pommes f Apfel Äpfel m manzana manzanas f
f orange oranges orange oranges f Orange Orangen f naranja naranjas f
f egg eggs œuf œufs m Ei Eier n huevo huevos m
f cake cakes gâteau gâteaux m Kuchen Kuchen m pastel pasteles m
f soup soups soupe soupes f Suppe Suppen f sopa sopas f
f salad salads salade salades f Salat Salate m ensalada ensaladas f
f pizza pizzas pizza pizzas f Pizza Pizzen f pizza pizzas f
a dog dogs chien chiens m Hund Hunde m perro perros m
a cat cats chat chats m Katze Katzen f gato gatos m
a horse horses cheval chevaux m Pferd Pferde n caballo caballos m
a bird birds oiseau oiseaux m Vogel Vögel m pájaro pájaros m
a cow cows vache vaches f Kuh Kühe f vaca vacas f
a mouse mice souris souris f Maus Mäuse f ratón ratones m
a pig pigs cochon cochons m Schwein Schweine n cerdo cerdos m
p man men homme hommes m Mann Männer m hombre hombres m
p woman women femme femmes f Frau Frauen f mujer mujeres f
p child children enfant enfants m Kind Kinder n niño niños m
p girl girls fille filles f Mädchen Mädchen n niña niñas f
p friend friends ami amis m Freund Freunde m amigo amigos m
p teacher teachers professeur professeurs m Lehrer Lehrer m profesor profesores m
p doctor doctors médecin médecins m Arzt Ärzte m médico médicos m
l station stations gare gares f Bahnhof Bahnhöfe m estación estaciones f
l hotel hotels hôtel hôtels m Hotel Hotels n hotel hoteles m
l church churches église églises f Kirche Kirchen f iglesia iglesias f
l school schools école écoles f Schule Schulen f escuela escuelas f
l museum museums musée musées m Museum Museen n museo museos m
l bank banks banque banques f Bank Banken f banco bancos m
l restaurant restaurants restaurant restaurants m Restaurant Restaurants n restaurante restaurantes m
l hospital hospitals hôpital hôpitaux m Krankenhaus Krankenhäuser n hospital hospitales m
l market markets marché marchés m Markt Märkte m mercado mercados m
l city cities ville villes f Stadt Städte f ciudad ciudades f
l bridge bridges pont ponts m Brücke Brücken f puente puentes m
l street streets rue rues f Straße Straßen f calle calles f
l shop shops magasin magasins m Geschäft Geschäfte n tienda tiendas f
"""

NOUNS: tuple[Noun, ...] = tuple(_noun(row) for row in _NOUN_ROWS.strip().splitlines())


def _adjective(row: str) -> Adjective:
    en, kinds, place, fr, de, es = row.split()
    fr_m, fr_f, fr_mp, fr_fp, *vowel = fr.split(",")
    de_word, *stem = de.split(",")
    es_m, es_f, es_mp, es_fp = es.split(",")
    return Adjective(
        en,
        kinds,
        place == "before",
        (fr_m, fr_f, fr_mp, fr_fp, vowel[0] if vowel else fr_m),
        (de_word, stem[0] if stem else de_word),
        (es_m, es_f, es_mp, es_fp),
    )


_ADJECTIVE_ROWS = """
red oal after rouge,rouge,rouges,rouges rot rojo,roja,rojos,rojas
green ol after vert,verte,verts,vertes grün verde,verde,verdes,verdes
blue ol after bleu,bleue,bleus,bleues blau azul,azul,azules,azules
black oa after noir,noire,noirs,noires schwarz negro,negra,negros,negras
white oal after blanc,blanche,blancs,blanches weiß blanco,blanca,blancos,blancas
yellow ol after jaune,jaune,jaunes,jaunes gelb amarillo,amarilla,amarillos,amarillas
grey oal after gris,grise,gris,grises grau gris,gris,grises,grises
modern ol after moderne,moderne,modernes,modernes modern moderno,moderna,modernos,modernas
expensive ofl after cher,chère,chers,chères teuer,teur caro,cara,caros,caras
heavy of after lourd,lourde,lourds,lourdes schwer pesado,pesada,pesados,pesadas
big ofapl before grand,grande,grands,grandes groß grande,grande,grandes,grandes
small ofapl before petit,petite,petits,petites klein pequeño,pequeña,pequeños,pequeñas
young ap before jeune,jeune,jeunes,jeunes jung joven,joven,jóvenes,jóvenes
old oapl before vieux,vieille,vieux,vieilles,vieil alt viejo,vieja,viejos,viejas
new ol before nouveau,nouvelle,nouveaux,nouvelles,nouvel neu nuevo,nueva,nuevos,nuevas
beautiful oapl before beau,belle,beaux,belles,bel schön bonito,bonita,bonitos,bonitas
"""

ADJECTIVES: tuple[Adjective, ...] = tuple(_adjective(row) for row in _ADJECTIVE_ROWS.strip().splitlines())

WEEKDAYS: tuple[tuple[str, str, str, str], ...] = (
    ("Monday", "lundi", "Montag", "lunes"),
    ("Tuesday", "mardi", "Dienstag", "martes"),
    ("Wednesday", "mercredi", "Mittwoch", "miércoles"),
    ("Thursday", "jeudi", "Donnerstag", "jueves"),
    ("Friday", "vendredi", "Freitag", "viernes"),
    ("Saturday", "samedi", "Samstag", "sábado"),
    ("Sunday", "dimanche", "Sonntag", "domingo"),
)

MONTHS: tuple[tuple[str, str, str, str], ...] = (
    ("January", "janvier", "Januar", "enero"),
    ("February", "février", "Februar", "febrero"),
    ("March", "mars", "März", "marzo"),
    ("April", "avril", "April", "abril"),
    ("May", "mai", "Mai", "mayo"),
    ("June", "juin", "Juni", "junio"),
    ("July", "juillet", "Juli", "julio"),
    ("August", "août", "August", "agosto"),
    ("September", "septembre", "September", "septiembre"),
    ("October", "octobre", "Oktober", "octubre"),
    ("November", "novembre", "November", "noviembre"),
    ("December", "décembre", "Dezember", "diciembre"),
)

# Days each month can have; February keeps 29 because the year is drawn apart from the day.
MONTH_DAYS: tuple[int, ...] = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

PARTS_OF_DAY: tuple[tuple[str, str, str, str], ...] = (
    ("in the morning", "du matin", "morgens", "de la mañana"),
    ("in the afternoon", "de l'après-midi", "nachmittags", "de la tarde"),
    ("in the evening", "du soir", "abends", "de la noche"),
)

LOCATIONS: tuple[tuple[str, str, str, str], ...] = (
    ("", "", "", ""),
    (" in the house", " dans la maison", " im Haus", " en la casa"),
    (" in the garden", " dans le jardin", " im Garten", " en el jardín"),
    (" in the street", " dans la rue", " auf der Straße", " en la calle"),
    (" in the kitchen", " dans la cuisine", " in der Küche", " en la cocina"),
    (" on the table", " sur la table", " auf dem Tisch", " en la mesa"),
    (" here", " ici", " hier", " aquí"),
)

# Sentences that end with a clock time; "{}" takes the "at ..." form.
TIMED_EVENTS: tuple[tuple[str, str, str, str], ...] = (
    ("the train leaves {}", "le train part {}", "der Zug fährt {} ab", "el tren sale {}"),
    ("the train arrives {}", "le train arrive {}", "der Zug kommt {} an", "el tren llega {}"),
    ("the shop opens {}", "le magasin ouvre {}", "das Geschäft öffnet {}", "la tienda abre {}"),
    ("the museum closes {}", "le musée ferme {}", "das Museum schließt {}", "el museo cierra {}"),
    ("we eat {}", "nous mangeons {}", "wir essen {}", "comemos {}"),
    (
        "I work until Friday {}",
        "Je travaille jusqu'à vendredi {}",
        "Ich arbeite bis Freitag {}",
        "Trabajo hasta el viernes {}",
    ),
    ("see you tomorrow {}", "à demain {}", "bis morgen {}", "hasta mañana {}"),
)

DAY_FRAMES: tuple[tuple[str, str, str, str], ...] = (
    ("today is {}", "aujourd'hui, c'est {}", "heute ist {}", "hoy es {}"),
    ("tomorrow is {}", "demain, c'est {}", "morgen ist {}", "mañana es {}"),
    ("see you on {}", "à {}", "bis {}", "hasta el {}"),
    ("I work on {}", "Je travaille {}", "Ich arbeite am {}", "Trabajo el {}"),
    ("we arrive on {}", "nous arrivons {}", "wir kommen am {} an", "llegamos el {}"),
    (
        "the museum is closed on {}",
        "le musée est fermé {}",
        "das Museum ist am {} geschlossen",
        "el museo está cerrado el {}",
    ),
)

NAMES: tuple[str, ...] = (
    "Anna", "Paul", "Maria", "Thomas", "Julia", "David", "Laura", "Daniel", "Sophie", "Martin", "Clara", "Lucas",
    "Emma", "Simon", "Nina", "Oscar", "Eva", "Leo", "Alice", "Hugo",
)  # fmt: skip

LIVING_IN: tuple[tuple[str, str, str, str], ...] = (
    ("Paris", "Paris", "Paris", "París"),
    ("Berlin", "Berlin", "Berlin", "Berlín"),
    ("Madrid", "Madrid", "Madrid", "Madrid"),
    ("London", "Londres", "London", "Londres"),
    ("Rome", "Rome", "Rom", "Roma"),
    ("Vienna", "Vienne", "Wien", "Viena"),
)

SET_PHRASES: tuple[tuple[str, str, str, str], ...] = (
    ("hello", "bonjour", "hallo", "hola"),
    ("good morning", "bonjour", "guten Morgen", "buenos días"),
    ("good afternoon", "bon après-midi", "guten Tag", "buenas tardes"),
    ("good evening", "bonsoir", "guten Abend", "buenas noches"),
    ("good night", "bonne nuit", "gute Nacht", "buenas noches"),
    ("goodbye", "au revoir", "auf Wiedersehen", "adiós"),
    ("see you tomorrow", "à demain", "bis morgen", "hasta mañana"),
    ("see you soon", "à bientôt", "bis bald", "hasta pronto"),
    ("thank you", "merci", "danke", "gracias"),
    ("thanks", "merci", "danke", "gracias"),
    ("thank you very much", "merci beaucoup", "vielen Dank", "muchas gracias"),
    ("please", "s'il vous plaît", "bitte", "por favor"),
    ("you are welcome", "de rien", "gern geschehen", "de nada"),
    ("yes", "oui", "ja", "sí"),
    ("no", "non", "nein", "no"),
    ("yes, please", "oui, s'il vous plaît", "ja, bitte", "sí, por favor"),
    ("no, thank you", "non, merci", "nein, danke", "no, gracias"),
    ("excuse me", "excusez-moi", "entschuldigen Sie", "disculpe"),
    ("I am sorry", "Je suis désolé", "Es tut mir leid", "Lo siento"),
    ("welcome", "bienvenue", "willkommen", "bienvenidos"),
    ("how are you?", "comment allez-vous ?", "wie geht es Ihnen?", "¿cómo está usted?"),
    ("I am fine", "Je vais bien", "Mir geht es gut", "Estoy bien"),
    ("I am well, thank you", "Je vais bien, merci", "Mir geht es gut, danke", "Estoy bien, gracias"),
    ("hello, how are you?", "bonjour, comment allez-vous ?", "hallo, wie geht es Ihnen?",
     "hola, ¿cómo está usted?"),
    ("how much is it?", "combien ça coûte ?", "wie viel kostet das?", "¿cuánto cuesta?"),
    ("how much does it cost?", "combien ça coûte ?", "wie viel kostet das?", "¿cuánto cuesta?"),
    ("where are the toilets?", "où sont les toilettes ?", "wo sind die Toiletten?", "¿dónde están los baños?"),
    ("what is this?", "qu'est-ce que c'est ?", "was ist das?", "¿qué es esto?"),
    ("what is your name?", "comment vous appelez-vous ?", "wie heißen Sie?", "¿cómo se llama usted?"),
    ("what time is it?", "quelle heure est-il ?", "wie spät ist es?", "¿qué hora es?"),
    ("what day is it today?", "quel jour sommes-nous ?", "welcher Tag ist heute?", "¿qué día es hoy?"),
    ("I do not understand", "Je ne comprends pas", "Ich verstehe nicht", "No entiendo"),
    ("I do not know", "Je ne sais pas", "Ich weiß nicht", "No lo sé"),
    ("do you speak English?", "parlez-vous anglais ?", "sprechen Sie Englisch?", "¿habla usted inglés?"),
    ("do you speak French?", "parlez-vous français ?", "sprechen Sie Französisch?", "¿habla usted francés?"),
    ("do you speak German?", "parlez-vous allemand ?", "sprechen Sie Deutsch?", "¿habla usted alemán?"),
    ("do you speak Spanish?", "parlez-vous espagnol ?", "sprechen Sie Spanisch?", "¿habla usted español?"),
    ("can you help me?", "pouvez-vous m'aider ?", "können Sie mir helfen?", "¿puede ayudarme?"),
    ("the bill, please", "l'addition, s'il vous plaît", "die Rechnung, bitte", "la cuenta, por favor"),
    ("have a nice day", "bonne journée", "einen schönen Tag", "que tenga un buen día"),
    ("happy birthday", "joyeux anniversaire", "alles Gute zum Geburtstag", "feliz cumpleaños"),
    ("good luck", "bonne chance", "viel Glück", "buena suerte"),
    ("I love you", "Je t'aime", "Ich liebe dich", "Te quiero"),
    ("I am hungry", "J'ai faim", "Ich habe Hunger", "Tengo hambre"),
    ("I am thirsty", "J'ai soif", "Ich habe Durst", "Tengo sed"),
    ("it is cold", "il fait froid", "es ist kalt", "hace frío"),
    ("it is hot", "il fait chaud", "es ist heiß", "hace calor"),
    ("today", "aujourd'hui", "heute", "hoy"),
    ("tomorrow", "demain", "morgen", "mañana"),
    ("yesterday", "hier", "gestern", "ayer"),
    ("noon", "midi", "Mittag", "mediodía"),
    ("midnight", "minuit", "Mitternacht", "medianoche"),
    ("it is noon", "il est midi", "es ist Mittag", "es mediodía"),
    ("it is midnight", "il est minuit", "es ist Mitternacht", "es medianoche"),
)  # fmt: skip
