// Copies the address of what is shown.
export default function ({ parentElement }) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy link";
    button.onclick = async () => {
        try { await navigator.clipboard.writeText(window.location.href); button.textContent = "Copied"; }
        catch { button.textContent = "Copy it from the address bar"; }  // without https there is no clipboard
        setTimeout(() => { button.textContent = "Copy link"; }, 2000);
    };
    parentElement.querySelector(".link").replaceChildren(button);
}
