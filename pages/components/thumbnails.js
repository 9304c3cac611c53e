// Pictures side by side, each with its name below.
const PIXELS = 128;  // twice those of the largest

export default function ({ parentElement, data }) {
    const root = parentElement.querySelector(".thumbnails");
    root.replaceChildren(...data.pictures.map(({ picture, label, below }) => {
        const figure = element("figure"), canvas = element("canvas");
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", label);
        draw(canvas, picture, PIXELS);
        figure.append(canvas, element("figcaption", "", below));
        return figure;
    }));
}
