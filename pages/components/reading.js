// What the tokens of a prompt read, and who reads them. All text goes through textContent.
const READ_BY = "86,180,233";  // Okabe and Ito
const LARGE = 224, SMALL = 64, STRONGEST = 3;

export default function ({ parentElement, data, setTriggerValue }) {
    const root = parentElement.querySelector(".reading");
    const { tokens, span, head } = data, n = tokens.length;
    const scrolled = root.querySelector(".text")?.scrollTop ?? 0;
    const matrix = bytes(data.matrix);
    const at = (q, s) => matrix[q * n + s];

    const heads = element("div", "heads");
    data.small.forEach((picture, index) => {
        const button = element("button"), canvas = element("canvas");
        button.type = "button";
        button.setAttribute("aria-pressed", String(index === head));
        button.setAttribute("aria-label", `Pattern of head ${index}`);
        draw(canvas, picture, SMALL);
        button.append(canvas, element("span", "", String(index)));
        button.onclick = () => {
            for (const each of heads.children) each.setAttribute("aria-pressed", String(each === button && index !== head));
            setTriggerValue("head", index);
        };
        heads.append(button);
    });

    const text = element("div", "text"), says = element("div", "says");
    let anchor = span ? span[0] : null;
    const spans = tokens.map((token, position) => {
        const made = element("span", "token", token);
        made.tabIndex = 0;
        made.setAttribute("role", "button");
        made.dataset.position = position;
        if (span && position >= span[0] && position <= span[1]) made.classList.add("chosen");
        made.onmouseenter = made.onfocus = () => show(position);
        made.onmouseleave = made.onblur = () => show(null);
        const choose = (event) => {
            if (position === 0) return;  // BOS is no token of the prompt
            const from = event.shiftKey && anchor !== null ? anchor : position;
            if (!event.shiftKey) anchor = position;
            pick(Math.min(from, position), Math.max(from, position));
        };
        made.onclick = choose;
        made.onkeydown = (event) => {
            if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(event); }
            const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
            if (step) spans[position + step]?.focus();
        };
        text.append(made);
        return made;
    });

    function pick(first, last) {  // marked at once: the answer takes its time
        spans.forEach((each, i) => each.classList.toggle("chosen", i >= first && i <= last));
        setTriggerValue("token", [first, last]);
    }

    const name = (position) => `${position}: ${tokens[position].trim() || tokens[position]}`;
    const strongest = (values) => values
        .map((value, position) => ({ value, position })).filter(({ value }) => value)
        .sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, STRONGEST)
        .map(({ value, position }) => `${name(position)} (${(value / 127 * data.largest).toPrecision(2)})`)
        .join(", ") || "nothing";

    function show(hovered) {
        const position = hovered ?? span?.[1] ?? null;
        if (position === null) {
            spans.forEach((each) => { each.style.background = each.style.borderBottomColor = ""; each.classList.remove("hovered"); });
            says.textContent = "Hover a token: orange is what it reads, blue lines are the later tokens that read it. Click one, or shift-click a span, to list its features.";
            return;
        }
        const reads = tokens.map((_, s) => (s <= position ? at(position, s) : 0));
        const readers = tokens.map((_, q) => (q > position ? at(q, position) : 0));
        const most = Math.max(1, ...reads.map(Math.abs)), by = Math.max(1, ...readers.map(Math.abs));
        spans.forEach((each, i) => {
            each.style.background = reads[i] ? rgba(reads[i] / most * 100) : "";
            each.style.borderBottomColor = readers[i] ? rgba(readers[i] / by * 127, READ_BY) : "";
            each.classList.toggle("hovered", i === position);
        });
        says.textContent = `${data.what}. ${name(position)} reads ${strongest(reads)}; it is read by ${strongest(readers)}.`;
    }

    const large = element("figure", "large"), canvas = element("canvas");
    draw(canvas, data.large, LARGE);
    canvas.onmousemove = (event) => show(Math.min(n - 1, Math.floor(event.offsetY / LARGE * n)));
    canvas.onmouseleave = () => show(null);
    canvas.onclick = (event) => {
        const position = Math.min(n - 1, Math.floor(event.offsetY / LARGE * n));
        if (position > 0) pick(position, position);
    };
    large.append(canvas, element("figcaption", "", `${head === null ? "Mean over the heads" : `Head ${head}`}; row: a token, column: one it reads`));

    const left = element("div");
    left.append(heads, text, says);
    root.replaceChildren(left, large);
    text.scrollTop = scrolled;
    show(null);
}
