// Rows of which one is chosen, by mouse or by keys. All text goes through textContent.
const FIRES = "230,159,0", STRIP = [100, 14];  // width and height of a strip in pixels
const FOLDED = 5;  // rows of a group that are shown before it is unfolded

function element(tag, name, text) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
}

function written(value, { kind, digits }) {
    if (value === null) return "";
    if (kind === "percent") return `${(value * 100).toFixed(value >= 0.1 || value === 0 ? 0 : value >= 0.001 ? 1 : 3)}%`;
    if (kind === "count") return value.toLocaleString("en");
    if (kind === "number") return value.toFixed(digits);
    return String(value);
}

// One bar a token, as high as the feature fires there; hovered, it names the token. No canvas: a page would have a
// hundred, and browsers make a layer of each.
function strip(text, tokens) {
    const values = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), step = STRIP[0] / values.length;
    const [picture, bars] = ["svg", "path"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
    picture.setAttribute("width", STRIP[0]);
    picture.setAttribute("height", STRIP[1]);
    bars.setAttribute("fill", `rgb(${FIRES})`);
    bars.setAttribute("d", Array.from(values, (value, i) => {
        const wide = Math.max(1, step - 0.5), high = Math.max(2, value / 255 * STRIP[1]);
        return value ? `M${i * step} ${STRIP[1]}v${-high}h${wide}v${high}` : "";
    }).join(""));
    picture.append(bars);
    picture.onmousemove = (event) => {
        const i = Math.min(values.length - 1, Math.floor(event.offsetX / step));
        picture.parentElement.title = `${i}: ${tokens[i]}`;
    };
    return picture;
}

export default function draw({ parentElement, data, setTriggerValue }) {
    const root = parentElement.querySelector(".listing");
    const kept = root.kept ??= { sorted: null, unfolded: new Set() };  // until the page is left
    const { columns, rows, ids, group } = data;
    let chosen = data.chosen, shown = [];

    const order = rows.map((_, i) => i);
    if (kept.sorted && kept.sorted.column < columns.length) {
        const { column, up } = kept.sorted;
        const of = (i) => rows[i][column];
        order.sort((a, b) => {
            if (of(a) === null || of(b) === null) return (of(a) === null) - (of(b) === null);
            return (of(a) < of(b) ? -1 : of(a) > of(b) ? 1 : 0) * (up ? 1 : -1);
        });
    }
    const groups = new Map();  // in the order of their first rows
    order.forEach((i) => {
        const name = group === null ? "" : String(rows[i][group]);
        if (!groups.has(name)) groups.set(name, []);
        groups.get(name).push(i);
    });

    const several = groups.size > 1, width = columns.length - (several ? 1 : 0);  // cells of a row
    const scroller = element("div", "rows"), table = element("table"), body = element("tbody");
    scroller.tabIndex = 0;
    scroller.setAttribute("aria-label", data.name);
    const header = element("tr");
    columns.forEach((column, index) => {
        if (index === group && several) return;
        const cell = element("th", column.kind), by = element("button", "", column.label);
        by.type = "button";
        by.tabIndex = -1;  // tabbing passes by
        by.title = column.help || `Sort by ${column.label}`;
        if (kept.sorted?.column === index) by.textContent += kept.sorted.up ? " \u2191" : " \u2193";
        by.onclick = () => {
            const same = kept.sorted?.column === index;
            const first = column.kind === "text";  // words from a, numbers from the largest
            kept.sorted = same && kept.sorted.up !== first ? null : { column: index, up: same ? !first : first };
            redraw();
        };
        if (column.width) cell.style.width = `${column.width}px`;
        cell.append(by);
        header.append(cell);
    });
    const head = element("thead");
    head.append(header);

    function redraw() {
        draw({ parentElement, data: { ...data, chosen }, setTriggerValue });
    }

    function pick(id) {
        kept.chosen = chosen = id;
        shown.forEach(({ row, id: each }) => row.setAttribute("aria-selected", String(each === id)));
        shown.find(({ id: each }) => each === id)?.row.scrollIntoView({ block: "nearest" });
        setTriggerValue("picked", id);
        if (data.to_top) document.querySelector("[data-testid=stMain]")?.scrollTo({ top: 0 });
    }

    function step(by) {
        const at = shown.findIndex(({ id }) => id === chosen);
        const next = shown[at < 0 ? 0 : at + by];
        if (next) pick(next.id);
    }

    groups.forEach((members, name) => {
        if (several) {
            const row = element("tr", "group"), cell = element("th", "", `${columns[group].label} ${name}`);
            cell.colSpan = width;
            row.append(cell);
            body.append(row);
        }
        const folded = several && !kept.unfolded.has(name);
        members.forEach((i, place) => {
            if (folded && place >= FOLDED && ids[i] !== chosen) return;
            const row = element("tr");
            row.setAttribute("aria-selected", String(ids[i] === chosen));
            rows[i].forEach((value, index) => {
                if (index === group && several) return;
                const column = columns[index], cell = element("td", column.kind);
                if (column.kind === "strip") {
                    cell.append(strip(value, data.tokens));
                } else {
                    cell.textContent = written(value, column);
                    if (column.kind === "text") cell.title = cell.textContent;
                }
                row.append(cell);
            });
            row.onclick = () => pick(ids[i]);
            body.append(row);
            shown.push({ row, id: ids[i] });
        });
        if (folded && members.length > FOLDED) {
            const row = element("tr", "more"), cell = element("td"), all = element("button", "", `${members.length - FOLDED} more`);
            all.type = "button";
            all.onclick = () => { kept.unfolded.add(name); redraw(); };
            cell.colSpan = width;
            cell.append(all);
            row.append(cell);
            body.append(row);
        }
    });

    scroller.onkeydown = (event) => {
        const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
        if (!by) return;
        event.preventDefault();
        step(by);
    };
    if (kept.keys) document.removeEventListener("keydown", kept.keys);
    kept.keys = (event) => {
        if (!root.isConnected) return document.removeEventListener("keydown", kept.keys);
        const at = event.composedPath()[0];
        if (event.ctrlKey || event.metaKey || event.altKey || at.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(at.tagName)) return;
        if (event.key === "/") {
            event.preventDefault();
            document.querySelector(`input[aria-label="${CSS.escape(data.search)}"]`)?.focus();
        } else if (event.key === "j" || event.key === "k") {
            step(event.key === "j" ? 1 : -1);
        }
    };
    if (data.search) document.addEventListener("keydown", kept.keys);

    const before = root.querySelector(".rows"), focused = before?.contains(root.getRootNode().activeElement);
    const top = before && kept.ids === String(ids) ? before.scrollTop : 0;
    kept.ids = String(ids);
    table.append(head, body);
    scroller.append(table);
    scroller.style.maxHeight = `${data.height}px`;
    root.replaceChildren(scroller);
    scroller.scrollTop = top;
    const marked = shown.find(({ id }) => id === chosen)?.row;
    if (marked && kept.chosen !== chosen) {  // chosen elsewhere on the page
        const [low, high] = [marked.offsetTop - header.offsetHeight, marked.offsetTop + marked.offsetHeight];
        if (low < scroller.scrollTop || high > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = low;
    }
    kept.chosen = chosen;
    if (focused) scroller.focus({ preventScroll: true });
}
