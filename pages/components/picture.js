// Before the code of components that draw pictures.
const READS = "230,159,0", NEGATIVE = "213,94,0";  // Okabe and Ito

const bytes = (text) => Int8Array.from(atob(text), (c) => c.charCodeAt(0));
const rgba = (value, colour = READS) => `rgba(${value < 0 ? NEGATIVE : colour},${(Math.abs(value) / 127).toFixed(3)})`;

function element(tag, name, text) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
}

function draw(canvas, picture, pixels) {
    const values = bytes(picture.values), n = picture.size, cell = pixels / n;
    canvas.width = canvas.height = pixels;
    const context = canvas.getContext("2d");
    for (let q = 0; q < n; q++) {
        for (let s = 0; s < n; s++) {
            const value = values[q * n + s];
            if (!value) continue;
            context.fillStyle = rgba(value);
            const [left, top, right, bottom] = [s, q, s + 1, q + 1].map((edge) => Math.round(edge * cell));
            context.fillRect(left, top, right - left, bottom - top);
        }
    }
}
